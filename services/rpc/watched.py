"""Files that are read again when they change, while what they said before stays in force."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

_log = logging.getLogger(__name__)
LOOK_INTERVAL_S = 10.0
_Stamp = tuple[tuple[int, int, int] | None, ...]
ValueT = TypeVar("ValueT")


class WatchedFiles(Generic[ValueT]):
    """Holds what `read` makes of some files.

    New files that cannot be used, or only one of a pair so far, change nothing: that is logged
    once and told to `on_failure`. What `read` raises the first time is raised by the constructor.
    """

    def __init__(
        self,
        paths: tuple[Path, ...],
        read: Callable[[], ValueT],
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._paths = paths
        self._read = read
        self._on_failure = on_failure
        self._lock = Lock()
        self._stamp = _stamp_of(paths)
        self.value = read()

    async def follow(self) -> None:
        """Looks again and again, until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            await asyncio.to_thread(self.look)

    def look(self) -> bool:
        """Reads the files where they changed; returns whether there is a new value.

        Touches the disk, so a coroutine calls it in a thread; several threads may.
        """
        with self._lock:
            # Taken before they are read: what is written meanwhile is a change to find next time.
            stamp = _stamp_of(self._paths)
            if stamp == self._stamp:
                return False
            self._stamp = stamp
            try:
                self.value = self._read()
            except Exception as error:  # noqa: BLE001 - whatever it is, the old value is better
                # What was read is not shown beyond what the reader chose to say.
                _log.warning("%s; what was there before stays in force", error)
                self._on_failure()
                return False
            _log.info("read again: %s", ", ".join(str(path) for path in self._paths))
            return True


def _stamp_of(paths: tuple[Path, ...]) -> _Stamp:
    return tuple(_file_stamp(path) for path in paths)


def _file_stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
