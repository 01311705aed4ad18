"""What comes with weights: pack manifests, checkpoint metadata, revisions and their pointer."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from services.engines.loading import LoadedModel, ModelKind, ModelLoadError, load_model
from services.engines.pack_manifest import PackError, load_pack
from services.engines.packs import find_pack, resolve_model, verify_pack
from services.engines.revisions import RevisionError, RevisionStore
from services.engines.router_format import FormatError, read_prm_format, read_router_format
from services.engines.transformers_generator import TransformersGenerator
from services.rpc.model_program import made_ready
from services.rpc.program import StartError
from tests.load.driver import ACCEPTED, Boundary, Wrong, legible
from tests.load.odd_values import OddValues, document

_ROOT = Path(__file__).resolve().parents[2]
_TINY = _ROOT / "model_packs" / "tiny"
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
)


def model_files(folder: Path) -> list[Boundary]:
    """Returns the boundaries; files are written to `folder`."""
    return [
        _pack_manifests(folder / "pack"),
        _pack_names(folder / "packs"),
        _formats(folder / "formats"),
        _revisions(folder / "revisions"),
        _checkpoints(folder / "checkpoint"),
    ]


def _pack_manifests(folder: Path) -> Boundary:
    good = json.loads((_TINY / "pack.json").read_text())
    small = {**good, "models": {"draft": good["models"]["draft"]}, "files": good["files"][:2]}
    (folder / "draft").mkdir(parents=True)
    for name in ("config.json", "generation_config.json"):
        (folder / "draft" / name).write_bytes((_TINY / "draft" / name).read_bytes())

    def draw(odd: OddValues) -> bytes:
        if odd.chance(0.3):
            # Paths and numbers of files are what an attacker would choose.
            entry: dict[str, Any] = dict(odd.one_of(small["files"]))
            entry["path"] = odd.one_of(("draft/", "", "/", "../")) + odd.text()
            entry["size_bytes"] = odd.integer(-1, 2**70)
            return json.dumps({**small, "files": [*small["files"], entry]}).encode()
        return document(odd, small)

    def attempt(content: bytes) -> str:
        (folder / "pack.json").write_bytes(content)
        try:
            pack = load_pack(folder)
            for role in pack.models:
                pack.model_reference(role)
        except PackError as error:
            legible(str(error))
            return type(error).__name__
        inside = os.path.realpath(folder)
        for path in [
            *(model.path for model in pack.models.values()),
            *(f.path for f in pack.files),
        ]:
            if not Path(os.path.normpath(folder / path)).is_relative_to(inside):
                raise Wrong(f"{path!r} leads out of the pack")
        damages = verify_pack(pack)
        for damage in damages:
            legible(str(damage))
        return "damaged" if damages else ACCEPTED

    return Boundary("pack.json", 8, draw, attempt)


def _pack_names(folder: Path) -> Boundary:
    folder.mkdir()
    (folder / "tiny").symlink_to(_TINY)

    def draw(odd: OddValues) -> str:
        name = odd.text(may_be_broken=True)
        return odd.one_of(
            (name, f"tiny/{name}", f"{name}/draft", f"./{name}", "tiny", "tiny/draft")
        )

    def attempt(name: str) -> str:
        outcome = ACCEPTED
        for find in (find_pack, resolve_model):
            try:
                find(name, [folder])
            except PackError as error:
                legible(str(error))
                outcome = type(error).__name__
        return outcome

    return Boundary("pack names", 2, draw, attempt)


def _formats(folder: Path) -> Boundary:
    folder.mkdir()
    good = {
        name: json.loads((_TINY / name.removesuffix(".json") / name).read_text())
        for name in ("router.json", "prm.json")
    }

    def draw(odd: OddValues) -> tuple[str, bytes]:
        name = odd.one_of(("router.json", "router.json", "prm.json"))
        return name, document(odd, good[name])

    def attempt(given: tuple[str, bytes]) -> str:
        name, content = given
        path = folder / name
        path.write_bytes(content)
        try:
            if name == "prm.json":
                read_prm_format(path)
                return ACCEPTED
            known = read_router_format(path)
        except FormatError as error:
            legible(str(error))
            return type(error).__name__
        count = known.score_rule.logit_count(known.label_count)
        if count < 1_000 and not 0.0 <= known.score_rule.score([0.5] * count) <= 1.0:
            raise Wrong("the score is no probability")
        return ACCEPTED

    return Boundary("router.json and prm.json", 8, draw, attempt)


def _revisions(folder: Path) -> Boundary:
    folder.mkdir()
    checkpoint = folder / "made"
    checkpoint.mkdir()
    (checkpoint / "router.json").write_text("{}")
    place, cache = folder / "place", folder / "cache"
    store = RevisionStore(str(place))
    revision = store.add(checkpoint)
    store.point_to(revision, {"why": "first"})
    store.point_to(revision, {"why": "second"})
    paths = {
        "current.json": place / "current.json",
        "manifest": place / "revisions" / f"{revision}.json",
    }
    good = {name: path.read_bytes() for name, path in paths.items()}

    def draw(odd: OddValues) -> tuple[str, bytes]:
        name = odd.one_of(tuple(paths))
        if name == "manifest" and odd.chance(0.5):
            names = {odd.text(may_be_broken=True): odd.one_of(("0" * 64, odd.json()))}
            return name, json.dumps({"sha256": names}).encode()
        return name, document(odd, json.loads(good[name]))

    def attempt(given: tuple[str, bytes]) -> str:
        name, content = given
        paths[name].write_bytes(content)
        try:
            known = RevisionStore(str(place))
            known.history()
            current = known.current()
            if current is not None:
                known.fetch(current, cache)
            known.point_to(revision, {})
            known.rollback()
            return ACCEPTED
        except RevisionError as error:
            legible(str(error))
            return type(error).__name__
        finally:
            for name, path in paths.items():
                path.write_bytes(good[name])

    return Boundary("revisions", 8, draw, attempt)


def _checkpoints(folder: Path) -> Boundary:
    folder.mkdir()
    good = {name: (_TINY / "draft" / name).read_bytes() for name in _MODEL_FILES}
    for name, content in good.items():
        (folder / name).write_bytes(content)

    def draw(odd: OddValues) -> tuple[str, bytes]:
        name = odd.one_of(("config.json", *_MODEL_FILES))
        if name == "model.safetensors":
            # Its header is JSON behind its own length; the rest are weights.
            length = int.from_bytes(good[name][:8], "little")
            header, weights = good[name][8 : 8 + length], good[name][8 + length :]
            changed = document(odd, json.loads(header))
            size = len(changed) if odd.chance(0.8) else odd.integer(0, 2**64 - 1)
            return name, size.to_bytes(8, "little") + changed + weights
        return name, document(odd, json.loads(good[name]))

    def attempt(given: tuple[str, bytes]) -> str:
        name, content = given
        (folder / name).write_bytes(content)
        try:
            loaded = load_model(str(folder), ModelKind.CAUSAL_LM)
            asyncio.run(_written_once(loaded))
        except (ModelLoadError, StartError) as error:
            legible(str(error), line_count=20)
            return type(error).__name__
        finally:
            (folder / name).write_bytes(good[name])
        return ACCEPTED

    return Boundary("checkpoint files", 0.4, draw, attempt)


async def _written_once(loaded: LoadedModel) -> None:
    """Does with a model what a program does before it serves."""
    engine = TransformersGenerator(loaded)
    try:
        await made_ready(engine)
    finally:
        await engine.close()
