"""Model packs: folders of weights whose every file is pinned by its digest.

A pack is a folder with a `pack.json` that names its models and lists its files with their sizes
and sha256 digests. Whatever a service could read of a pack is listed; a file that nobody pinned is
damage like a changed one. This module opens no weights and imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

from arbitrage.core.shown import one_line, shown

FORMAT_VERSION = 1
MANIFEST_NAME = "pack.json"
PROBLEMS_NAME = "problems.jsonl"
SEARCH_PATH_VARIABLE = "ARBITRAGE_MODEL_PACKS"
_BUNDLED = Path(__file__).resolve().parents[2] / "model_packs"
_BLOCK_BYTES = 1 << 20
_MOST_BYTES = (1 << 63) - 1


class PackError(Exception):
    """A pack cannot be used. The message names the pack or file and the fix."""


class UnknownPack(PackError):
    """No pack of that name lies on the search path."""


class CorruptPack(PackError):
    """A manifest or a file is not what it should be."""


@dataclass(frozen=True, slots=True)
class PackModel:
    """One model of a pack: its folder inside the pack and what kind of head it has."""

    path: str
    kind: str


@dataclass(frozen=True, slots=True)
class PackFile:
    """One file of a pack with what it must be. `path` is relative to the pack, with slashes."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack as its manifest describes it; nothing says yet that the files are there."""

    folder: Path
    name: str
    licence: str
    description: str
    models: Mapping[str, PackModel]
    files: tuple[PackFile, ...]

    @property
    def size_bytes(self) -> int:
        """Sum of all files."""
        return sum(file.size_bytes for file in self.files)

    def model_folder(self, role: str) -> Path:
        """Returns the folder that holds the weights for `role`.

        Raises:
            UnknownPack: the pack has no such role.
        """
        model = self.models.get(role)
        if model is None:
            roles = ", ".join(sorted(self.models))
            raise UnknownPack(
                f"pack {shown(self.name)} has no {shown(role)}; it has: {one_line(roles, 400)}"
            )
        return self.folder / model.path


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


def resolve_model(reference: str, folders: Iterable[Path] | None = None) -> Path | None:
    """Returns the folder behind a pack member such as `tiny/draft`; None where it names no pack.

    Raises:
        CorruptPack: the pack is there and its manifest is not usable.
        UnknownPack: the pack is there and has no such role.
    """
    name, slash, role = reference.partition("/")
    if not slash or not name or "/" in role:
        return None
    for folder in pack_folders(search_path() if folders is None else folders):
        if folder.name == name:
            return load_pack(folder).model_folder(role)
    return None


def load_pack(folder: Path) -> Pack:
    """Reads and checks the manifest in `folder`.

    Raises:
        CorruptPack: names the manifest's field and what is wrong with it.
    """
    manifest = folder / MANIFEST_NAME
    try:
        content = json.loads(manifest.read_bytes(), object_pairs_hook=_each_key_once)
    except (OSError, ValueError) as error:
        raise CorruptPack(f"{manifest}: cannot be read: {error}") from None
    except RecursionError:
        raise CorruptPack(f"{manifest}: cannot be read: it is nested too deep") from None
    read = _Reader(manifest)
    top = read.mapping(content, "the manifest")
    version = read.integer(top, "format_version")
    if version != FORMAT_VERSION:
        raise read.refusal(
            "format_version",
            f"is {shown(version)}, this version reads {FORMAT_VERSION}; upgrade arbitrage",
        )
    models = {
        role: PackModel(read.path(entry, "path"), read.text(entry, "kind"))
        for role, entry in read.entries(top, "models")
    }
    files = tuple(_pack_file(read, entry) for entry in read.rows(top, "files"))
    for role, model in models.items():
        if not any(PurePosixPath(file.path).is_relative_to(model.path) for file in files):
            inside = one_line(f"{model.path}/")
            raise read.refusal(
                "files", f"must list those of {one_line(role)}, which are in {inside}"
            )
    return Pack(
        folder=folder,
        name=read.text(top, "name"),
        licence=read.text(top, "licence"),
        description=read.text(top, "description"),
        models=models,
        files=files,
    )


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
        problem = _problem_of(pack.folder, file, on_bytes)
        if problem is not None:
            damages.append(Damage(file.path, problem))
    listed = {file.path for file in pack.files}
    unpinned = (path for path in _present_paths(pack) if path not in listed)
    damages += [Damage(path, f"is not listed in {MANIFEST_NAME}; remove it") for path in unpinned]
    return tuple(damages)


def _problem_of(folder: Path, file: PackFile, on_bytes: Callable[[int], object]) -> str | None:
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
    for model_path in sorted({model.path for model in pack.models.values()}):
        for parent, folder_names, file_names in os.walk(pack.folder / model_path):
            inside = Path(parent).relative_to(pack.folder)
            # Such a link is not walked into, but a loader would follow it.
            links = [name for name in folder_names if Path(parent, name).is_symlink()]
            yield from ((inside / name).as_posix() for name in sorted(links + file_names))
    if os.path.lexists(pack.folder / PROBLEMS_NAME):
        yield PROBLEMS_NAME


def _each_key_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Makes an object, or refuses one that other readers may understand differently."""
    content: dict[str, object] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"{shown(key)} is there twice in one object; keep one")
        content[key] = value
    return content


def _pack_file(read: _Reader, entry: Mapping[str, object]) -> PackFile:
    digest = read.text(entry, "sha256")
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise read.refusal("sha256", f"must be 64 lower-case hex digits, got {shown(digest)}")
    size = read.integer(entry, "size_bytes")
    if not 0 <= size <= _MOST_BYTES:
        raise read.refusal("size_bytes", f"must be from 0 to {_MOST_BYTES}, got {shown(size)}")
    return PackFile(read.path(entry, "path"), size, digest)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Takes typed values out of a manifest, or says which one is wrong."""

    manifest: Path

    def refusal(self, field: str, problem: str) -> CorruptPack:
        return CorruptPack(f"{self.manifest}: {field} {problem}")

    def mapping(self, value: object, field: str) -> Mapping[str, object]:
        if not isinstance(value, dict):
            raise self.refusal(field, f"must be an object, got {type(value).__name__}")
        return value

    def text(self, entry: Mapping[str, object], field: str) -> str:
        value = entry.get(field)
        if not isinstance(value, str):
            raise self.refusal(field, f"must be a string, got {shown(value)}")
        # Nothing that no file name and no terminal can hold.
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise self.refusal(field, f"must be text without NUL, got {shown(value)}")
        return value

    def integer(self, entry: Mapping[str, object], field: str) -> int:
        value = entry.get(field)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refusal(field, f"must be an integer, got {shown(value)}")
        return value

    def path(self, entry: Mapping[str, object], field: str) -> str:
        value = self.text(entry, field)
        path = PurePosixPath(value)
        # A manifest may come from anywhere: it must not name a file outside its own folder.
        if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in value:
            raise self.refusal(field, f"must stay inside the pack, got {shown(value)}")
        return path.as_posix()

    def entries(
        self, entry: Mapping[str, object], field: str
    ) -> Iterator[tuple[str, Mapping[str, object]]]:
        for name, value in self.mapping(entry.get(field), field).items():
            yield name, self.mapping(value, f"{field}.{one_line(name)}")

    def rows(self, entry: Mapping[str, object], field: str) -> Iterator[Mapping[str, object]]:
        value = entry.get(field)
        if not isinstance(value, list):
            raise self.refusal(field, f"must be a list, got {shown(value)}")
        for index, row in enumerate(value):
            yield self.mapping(row, f"{field}[{index}]")
