"""Model packs: folders of weights whose every file is pinned by its digest.

A pack is a folder with a `pack.json` that names its models and lists its files with their sizes
and sha256 digests. Whatever a service could read of a pack is listed; a file that nobody pinned is
damage like a changed one. This module opens no weights and imports no torch.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from arbitrage.core.shown import one_line, shown
from services.engines.pack_manifest import (
    MANIFEST_NAME,
    PROBLEMS_NAME,
    Pack,
    PackFile,
    UnknownPack,
    load_pack,
)

SEARCH_PATH_VARIABLE = "ARBITRAGE_MODEL_PACKS"
_BUNDLED = Path(__file__).resolve().parents[2] / "model_packs"
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Damage:
    """One file of a pack that is not what the manifest says."""

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{one_line(self.path, 200)}: {self.problem}"


def search_path(environ: Mapping[str, str] = os.environ) -> tuple[Path, ...]:
    """Returns the folders packs are looked for in, those of the environment first."""
    named = environ.get(SEARCH_PATH_VARIABLE, "")
    return (*(Path(part) for part in named.split(os.pathsep) if part), _BUNDLED)


def pack_folders(folders: Iterable[Path]) -> Iterator[Path]:
    """Yields every folder under `folders` that holds a manifest, sorted, each name once."""
    seen: set[str] = set()
    for folder in folders:
        for manifest in sorted(folder.glob(f"*/{MANIFEST_NAME}")):
            if manifest.parent.name not in seen:
                seen.add(manifest.parent.name)
                yield manifest.parent


def find_pack(name_or_path: str, folders: Iterable[Path] | None = None) -> Pack:
    """Returns the pack with that folder name, or the one at that path.

    Only a text with a slash in it (or `.`) is a path, so a stray folder in the working directory
    never hides a pack.

    Raises:
        UnknownPack, CorruptPack
    """
    if os.sep in name_or_path or name_or_path in {".", ".."}:
        folder = Path(name_or_path)
        # Not Path.is_file, which raises on names that no file system can hold.
        if not os.path.isfile(folder / MANIFEST_NAME):
            raise UnknownPack(
                f"{one_line(str(folder), 200)} is no model pack: it holds no {MANIFEST_NAME}"
            )
        return load_pack(folder)
    searched = search_path() if folders is None else tuple(folders)
    known = {folder.name: folder for folder in pack_folders(searched)}
    if name_or_path in known:
        return load_pack(known[name_or_path])
    if not known:
        raise UnknownPack(
            f"unknown model pack {shown(name_or_path)}: no packs found in "
            f"{', '.join(str(folder) for folder in searched)}; "
            f"set {SEARCH_PATH_VARIABLE} to the folder that holds it, or give a path"
        )
    closest = get_close_matches(name_or_path, known, n=len(known), cutoff=0.0)
    raise UnknownPack(
        f"unknown model pack {shown(name_or_path)}; known packs: {', '.join(closest)}. "
        f"Give one of these, a path, or set {SEARCH_PATH_VARIABLE} to the folder that holds it"
    )


def resolve_model(reference: str, folders: Iterable[Path] | None = None) -> str | None:
    """Returns what a pack member such as `tiny/draft` stands for; None where it names no pack.

    That is a path, or `repository@revision` of a model on the hub.

    Raises:
        CorruptPack: the pack is there and its manifest is not usable.
        UnknownPack: the pack is there and has no such role.
    """
    name, slash, role = reference.partition("/")
    if not slash or not name or "/" in role:
        return None
    for folder in pack_folders(search_path() if folders is None else folders):
        if folder.name == name:
            return load_pack(folder).model_reference(role)
    return None


def verify_pack(
    pack: Pack, on_bytes: Callable[[int], object] = lambda count: None
) -> tuple[Damage, ...]:
    """Compares every file with the manifest and returns those that differ or are not in it.

    Everything in a model's folder counts, and the problems; what else lies at the top, such as a
    README or the code that made the pack, is read by no service. `on_bytes` is told how many more
    bytes were read, for a progress display.
    """
    damages = []
    for file in pack.files:
        problem = problem_of(pack.files_folder, file, on_bytes)
        if problem is not None:
            damages.append(Damage(file.path, problem))
    listed = {file.path for file in pack.files}
    unpinned = (path for path in _present_paths(pack) if path not in listed)
    damages += [Damage(path, f"is not listed in {MANIFEST_NAME}; remove it") for path in unpinned]
    return tuple(damages)


def problem_of(folder: Path, file: PackFile, on_bytes: Callable[[int], object]) -> str | None:
    """Returns what is wrong with one file under `folder`; None where it is as it should be."""
    # Not Path.resolve, which raises on links that go in a circle.
    path = os.path.realpath(folder / file.path)
    if not Path(path).is_relative_to(os.path.realpath(folder)):
        return f"leads out of the pack, to {one_line(path, 200)}; put the file itself there"
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return "is no regular file"
        if status.st_size != file.size_bytes:
            return f"expected {file.size_bytes} bytes, found {status.st_size}"
        digest = hashlib.sha256()
        with open(path, "rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
                on_bytes(len(block))
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    found = digest.hexdigest()
    if found == file.sha256:
        return None
    return f"expected sha256 {file.sha256}, found {found}"


def _present_paths(pack: Pack) -> Iterator[str]:
    """Yields what lies in the model folders, links to folders included, and the problems."""
    for model_path in sorted({model.path for model in pack.models.values() if model.path}):
        for parent, folder_names, file_names in os.walk(pack.files_folder / model_path):
            inside = Path(parent).relative_to(pack.files_folder)
            # Such a link is not walked into, but a loader would follow it.
            links = [name for name in folder_names if Path(parent, name).is_symlink()]
            yield from ((inside / name).as_posix() for name in sorted(links + file_names))
    if os.path.lexists(pack.folder / PROBLEMS_NAME):
        yield PROBLEMS_NAME
