"""Revisions of a checkpoint at one place, and which of them is current.

    <location>/revisions/<revision>/…      the checkpoint's files, never changed
    <location>/revisions/<revision>.json   their digests; without it a revision is not whole
    <location>/current.json                the pointer, with the history of what it pointed to

The pointer is the commit: a revision's files are there in full before the pointer names it, and
replacing the pointer is one atomic act, on a folder as on an object store. Training writes here and
the router service reads; they share nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from arbitrage.core.shown import one_line, shown

FORMAT_VERSION = 1
POINTER_NAME = "current.json"
_REVISION = re.compile(r"[0-9a-f]{16}")
# A copy that nothing was written to for so long is one whose process is gone.
_ABANDONED_AFTER_S = 3600.0
_Found = TypeVar("_Found")


class RevisionError(Exception):
    """A location or a revision cannot be used. Names it, what is wrong, and the fix."""


class LocationUnreachable(RevisionError):
    """A location cannot be read or written now; it may be later."""


@dataclass(frozen=True, slots=True)
class Promotion:
    """One time that a revision became current, and what was noted then."""

    revision: str
    promoted_at: str
    note: Mapping[str, Any]


class RevisionStore:
    """The revisions at a location: a local folder, or a URL that `fsspec` knows."""

    def __init__(self, location: str) -> None:
        self.location = location.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.location)
        except (ImportError, ValueError) as error:
            raise RevisionError(
                f"{location}: {error}; give a folder or a URL, and install what its kind needs "
                "(the extras s3 and gcs)"
            ) from None

    def current(self) -> str | None:
        """Returns the current revision; None where nothing was promoted yet.

        Raises:
            RevisionError
        """
        history = self.history()
        return history[-1].revision if history else None

    def history(self) -> tuple[Promotion, ...]:
        """Returns what was current, oldest first.

        Raises:
            RevisionError
        """
        pointer = self._pointer()
        return tuple(
            Promotion(
                str(entry["revision"]),
                str(entry["promoted_at"]),
                {k: v for k, v in entry.items() if k not in {"revision", "promoted_at"}},
            )
            for entry in pointer["history"]
        )

    def add(self, folder: Path) -> str:
        """Copies a checkpoint and returns its revision, which its files alone decide.

        What a crash left half copied is completed by doing it again, and so is what was damaged.

        Raises:
            RevisionError
        """
        files, revision = _files_of(folder), revision_of(folder)
        if self._is_whole(revision, files):
            return revision

        def copy() -> None:
            target = self._path(revision)
            self._files.makedirs(target, exist_ok=True)
            for name in files:
                self._files.put_file(str(folder / name), f"{target}/{name}")
            self._put(f"{target}.json", {"sha256": files})

        self._reached(copy)
        return revision

    def point_to(self, revision: str, note: Mapping[str, Any]) -> None:
        """Makes a revision current.

        Raises:
            RevisionError: it is not there in full.
        """
        self._manifest(revision)
        entry = {**note, "revision": revision, "promoted_at": datetime.now(UTC).isoformat()}
        history = [*self._pointer()["history"], entry]
        self._write_pointer(history)

    def rollback(self) -> str:
        """Makes the revision current that was before the present one, and returns it.

        Raises:
            RevisionError: there was none.
        """
        history = self._pointer()["history"]
        if len(history) <= 1:
            raise RevisionError(
                f"{self.location}: there is no revision before the current one to roll back to"
            )
        self._manifest(str(history[-2]["revision"]))
        self._write_pointer(history[:-1])
        return str(history[-2]["revision"])

    def fetch(self, revision: str, folder: Path) -> Path:
        """Returns a local folder with the revision's files, each of them checked.

        On a local file system that is where they lie; otherwise they are copied below `folder`.

        Raises:
            RevisionError: a file is not what the manifest says.
        """
        expected = self._manifest(revision)
        if isinstance(self._files, LocalFileSystem):
            local = Path(self._path(revision))
            self._check(revision, local, expected)
            return local
        local = folder / revision
        if local.is_dir():
            try:
                self._check(revision, local, expected)
            except RevisionError:
                # The copy is damaged; what it was made of may not be.
                shutil.rmtree(local, ignore_errors=True)
            else:
                return local
        # A process's number alone is not its own where several containers share the folder.
        partial = folder / f"{revision}.{socket.gethostname()}.{os.getpid()}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        for other in folder.glob("*.partial"):
            if _is_abandoned(other):
                shutil.rmtree(other, ignore_errors=True)
        partial.mkdir(parents=True)

        def copy() -> None:
            for name in expected:
                self._files.get_file(f"{self._path(revision)}/{name}", str(partial / name))

        self._reached(copy)
        self._check(revision, partial, expected)
        try:
            partial.replace(local)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if not local.is_dir():
                raise RevisionError(f"{local}: cannot be written: {error}") from error
            # Another process was sooner.
            self._check(revision, local, expected)
        return local

    def _path(self, revision: str) -> str:
        # The name comes from outside and becomes part of a path.
        if not _REVISION.fullmatch(revision):
            raise RevisionError(
                f"{self.location}: {shown(revision)} is no revision; "
                "they have 16 hexadecimal digits"
            )
        return f"{self._root}/revisions/{revision}"

    def _is_whole(self, revision: str, files: Mapping[str, str]) -> bool:
        target = self._path(revision)

        def sha256(name: str) -> str:
            with self._files.open(f"{target}/{name}", "rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()

        def is_whole() -> bool:
            try:
                return bool(self._files.exists(f"{target}.json")) and all(
                    sha256(name) == expected for name, expected in files.items()
                )
            except FileNotFoundError:
                return False

        return self._reached(is_whole)

    def _manifest(self, revision: str) -> dict[str, str]:
        fields = self._read(f"{self._path(revision)}.json")
        if fields is None or not isinstance(fields.get("sha256"), dict):
            raise RevisionError(
                f"{self.location}: revision {revision} is not there in full; promote it again"
            )
        names: dict[str, str] = fields["sha256"]
        for name in names:
            if Path(name).name != name:
                raise RevisionError(
                    f"{self.location}: revision {revision} names the file {shown(name)}, "
                    "which is a path"
                )
        return names

    def _check(self, revision: str, folder: Path, expected: Mapping[str, str]) -> None:
        for name, sha256 in expected.items():
            path = folder / name
            # Not Path.is_file, which raises on names that no file system can hold.
            if not os.path.isfile(path) or _sha256(path) != sha256:
                raise RevisionError(
                    f"{self.location}: revision {revision}: {one_line(name)} is damaged or "
                    "missing; promote the router again, or roll back"
                )

    def _pointer(self) -> dict[str, Any]:
        fields = self._read(f"{self._root}/{POINTER_NAME}")
        if fields is None:
            return {"history": []}
        version = fields.get("format_version")
        if version != FORMAT_VERSION:
            raise RevisionError(
                f"{self.location}/{POINTER_NAME}: format_version: unknown version "
                f"{shown(version)}; this program reads {FORMAT_VERSION}"
            )
        history = fields.get("history")
        if not isinstance(history, list) or not all(
            isinstance(entry, dict) and {"revision", "promoted_at"} <= entry.keys()
            for entry in history
        ):
            raise RevisionError(
                f"{self.location}/{POINTER_NAME}: history: expected a list of promotions, "
                f"got {shown(history)}"
            )
        return fields

    def _write_pointer(self, history: list[dict[str, Any]]) -> None:
        fields = {
            "format_version": FORMAT_VERSION,
            "revision": history[-1]["revision"],
            "history": history,
        }
        self._reached(lambda: self._put(f"{self._root}/{POINTER_NAME}", fields))

    def _read(self, path: str) -> dict[str, Any] | None:
        def read() -> bytes | None:
            try:
                content: bytes = self._files.cat_file(path)
            except FileNotFoundError:
                return None
            return content

        content = self._reached(read)
        if content is None:
            return None
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError) as error:
            # A ValueError is bad UTF-8, no JSON, or a number of thousands of digits.
            raise RevisionError(f"{path}: it is no JSON ({error}); promote again") from None
        if not isinstance(fields, dict):
            raise RevisionError(f"{path}: expected an object, got {type(fields).__name__}")
        return fields

    def _put(self, path: str, fields: Mapping[str, Any]) -> None:
        content = json.dumps(fields, indent=1).encode()
        if not isinstance(self._files, LocalFileSystem):
            # An object store puts an object in one act.
            self._files.pipe_file(path, content)
            return
        partial = Path(f"{path}.{os.getpid()}.partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)

    def _reached(self, act: Callable[[], _Found]) -> _Found:
        try:
            return act()
        except RevisionError:
            raise
        except Exception as error:
            raise LocationUnreachable(
                f"{self.location}: it cannot be read or written ({type(error).__name__}: {error}); "
                "check the path, the network and the credentials"
            ) from error


def revision_of(folder: Path) -> str:
    """Returns the revision that a checkpoint has wherever it is added.

    Raises:
        RevisionError: it holds no files.
    """
    return hashlib.sha256(json.dumps(_files_of(folder)).encode()).hexdigest()[:16]


def is_location(reference: str) -> bool:
    """Tells whether `reference` names a place of revisions and not a checkpoint itself."""
    return "://" in reference or Path(reference, POINTER_NAME).is_file()


def _files_of(folder: Path) -> dict[str, str]:
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    if not files:
        raise RevisionError(f"{folder}: it holds no files; give a checkpoint folder")
    return files


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_abandoned(partial: Path) -> bool:
    try:
        written_s = max(path.stat().st_mtime for path in (partial, *partial.iterdir()))
    except OSError:
        # Its own process has just finished with it.
        return False
    return time.time() - written_s > _ABANDONED_AFTER_S
