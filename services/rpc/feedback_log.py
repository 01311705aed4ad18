"""Feedback records as JSON lines in a folder: orchestrators append, training reads.

Each process writes files of its own. A record is on the disk once `write` has returned; a process
that is killed, or a full disk, leaves at most one torn line at the end of a file.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import json_format

from arbitrage.core.shown import one_line
from arbitrage.v1 import feedback_pb2

_log = logging.getLogger(__name__)
_MIB = 1 << 20


class FeedbackLog:
    """Appends records to files of this process; a file that has grown too large is followed up.

    Threads may append at once.
    """

    def __init__(self, folder: Path, max_file_mib: int = 64) -> None:
        self._folder = folder
        self._max_bytes = max_file_mib * _MIB
        self._path: Path | None = None
        self._lock = threading.Lock()

    async def append(self, record: feedback_pb2.ObservedStep) -> None:
        """Writes one record in a thread; raises as `write` does."""
        await asyncio.to_thread(self.write, record)

    def write(self, record: feedback_pb2.ObservedStep) -> None:
        """Writes one record.

        Raises:
            OSError: the disk is full or the folder is gone.
        """
        line = json_format.MessageToJson(record, preserving_proto_field_name=True, indent=None)
        with self._lock:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._path
            if path is None or self._is_full(path):
                name = f"feedback-{socket.gethostname()}-{os.getpid()}-{time.time_ns()}.jsonl"
                path = self._folder / name
            # Whatever fails leaves a torn line, and nothing may follow it: a new file is begun.
            self._path = None
            with path.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            self._path = path

    def _is_full(self, path: Path) -> bool:
        return path.exists() and path.stat().st_size >= self._max_bytes


def read_feedback(folder: Path) -> Iterator[feedback_pb2.ObservedStep]:
    """Yields every record of a folder.

    A last line that was torn when its process died is passed over.

    Raises:
        ValueError: another line is no record; names file and line.
    """
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield json_format.Parse(line.decode(), feedback_pb2.ObservedStep())
            except (json_format.ParseError, UnicodeDecodeError) as error:
                if number == len(lines):
                    # Only the last line has nothing after it, not even its end.
                    _log.warning("%s: line %d is torn and passed over", path, number)
                    continue
                said = one_line(str(error), 400)
                raise ValueError(f"{path}: line {number} is no record ({said})") from None
