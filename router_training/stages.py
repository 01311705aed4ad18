"""Runs a stage only where its outputs are not current.

A stage is current while the digest of all it was made from is the one in its stamp. The stamp is
written last, so a stage that was killed is not current, and its rerun goes on from what it left.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from router_training.errors import DatasetInvalid, StorageFailed

_log = logging.getLogger(__name__)


def digest(*parts: Any) -> str:
    """Returns the sha256 of JSON values.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class Stamps:
    """The stamps of a work folder's stages."""

    def __init__(self, work: Path, *, force: bool) -> None:
        self._work = work
        self._force = force

    def run(self, stage: str, made_from: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns what `work` tells of its outputs, or what it told when it ran on the same."""
        stamp = self.read(stage)
        if stamp is not None and stamp["made_from"] == made_from and not self._force:
            _log.info("%s: current", stage)
            outputs: dict[str, Any] = stamp["outputs"]
            return outputs
        _log.info("%s: running", stage)
        outputs = work()
        if is_first_process():
            self._write(stage, {"made_from": made_from, "outputs": outputs})
        _log.info("%s: done", stage)
        return outputs

    def read(self, stage: str) -> dict[str, Any] | None:
        """Returns a stage's stamp; None where it has not run to its end."""
        path = self._path(stage)
        try:
            stamp: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DatasetInvalid(f"{path}: it is no stamp ({error}); remove it") from None
        return stamp

    def outputs(self, stage: str) -> dict[str, Any]:
        """Returns what a stage told of its outputs.

        Raises:
            DatasetInvalid: it has not run.
        """
        stamp = self.read(stage)
        if stamp is None:
            raise DatasetInvalid(
                f"{self._work}: stage {stage!r} has not run here; run it first, or `run` for all"
            )
        outputs: dict[str, Any] = stamp["outputs"]
        return outputs

    def made_from(self, stage: str) -> str:
        """Returns the digest of what a stage was made from."""
        self.outputs(stage)
        stamp = self.read(stage)
        assert stamp is not None
        return str(stamp["made_from"])

    def _path(self, stage: str) -> Path:
        return self._work / f"{stage}.stamp.json"

    def _write(self, stage: str, stamp: dict[str, Any]) -> None:
        write_atomically(self._path(stage), json.dumps(stamp, indent=1))


def is_first_process() -> bool:
    """Whether this is the process that writes: under `torchrun` several do the same work."""
    return os.environ.get("RANK", "0") == "0"


def process_count() -> int:
    """Returns how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def write_atomically(path: Path, text: str) -> None:
    """Writes a file whole or not at all, on the disk when this returns.

    Raises:
        StorageFailed
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StorageFailed(
            f"{path}: it cannot be written ({error.strerror or error}); make room or correct the "
            "folder, and run the same command again"
        ) from None
