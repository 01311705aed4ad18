"""Puts trained models into the pack's folder and lists every file with its digest in `pack.json`.

A model folder is written beside its place and then renamed: a reader never meets half of one.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from transformers import PreTrainedModel

from model_packs.tiny.domain import SEPARATOR, Problem, Split, problems
from model_packs.tiny.tokenizer import save_tokenizer

PACK: Final = Path(__file__).parent
HELD_OUT_SEED: Final = 9001
HELD_OUT_COUNT: Final = 500
_KINDS: Final = {
    "draft": "causal-lm",
    "target": "causal-lm",
    "prm": "process-reward-model",
    "router": "router",
}


def held_out_problems() -> list[Problem]:
    """Returns the problems of demo and benchmarks; no stage trains or calibrates on them."""
    unique = {
        p.text: p
        for p in itertools.islice(problems(HELD_OUT_SEED, Split.HELD_OUT), HELD_OUT_COUNT * 2)
    }
    return list(unique.values())[:HELD_OUT_COUNT]


def write_problems(pack: Path = PACK) -> None:
    """Writes `problems.jsonl`."""
    lines = [
        json.dumps(
            {
                "id": p.problem_id,
                "problem": p.text,
                "answer": str(p.answer),
                "steps": p.steps,
                "kind": p.kind,
            }
        )
        for p in held_out_problems()
    ]
    write_atomically(pack / "problems.jsonl", "\n".join(lines) + "\n")


def write_questions(questions: Sequence[Problem], pack: Path = PACK) -> None:
    """Writes training problems for `router_training`, one JSON object a line."""
    lines = [
        json.dumps({"problem": q.text, "answer": str(q.answer), "kind": q.kind.value})
        for q in questions
    ]
    write_atomically(pack / "questions.jsonl", "\n".join(lines) + "\n")


def take_router(checkpoint: Path, pack: Path = PACK) -> None:
    """Replaces the pack's router by a checkpoint folder, whole or not at all."""
    part, place, old = pack / ".router.part", pack / "router", pack / ".router.old"
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(checkpoint, part)
    if place.exists():
        os.replace(place, old)
    os.replace(part, place)
    shutil.rmtree(old, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file in one rename."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def export(
    model: PreTrainedModel, name: str, metadata: dict[str, object] | None = None, pack: Path = PACK
) -> None:
    """Writes one model's folder: weights, configuration, tokenizer and any `NAME.json`."""
    part, place, old = pack / f".{name}.part", pack / name, pack / f".{name}.old"
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(part)
    save_tokenizer(part)
    if metadata is not None:
        (part / f"{name}.json").write_text(json.dumps(metadata, indent=2) + "\n")
    if place.exists():
        os.replace(place, old)
    os.replace(part, place)
    shutil.rmtree(old, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Returns a file's sha256 in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_manifest(pack: Path = PACK) -> None:
    """Writes `pack.json` over the files that lie in the pack now."""
    used = [p for name in _KINDS for p in sorted((pack / name).iterdir())] + [
        pack / "problems.jsonl"
    ]
    manifest = {
        "format_version": 1,
        "name": "tiny",
        "licence": "Apache-2.0",
        "description": "Draft, target, reward model and router for checkable word problems.",
        "separator": SEPARATOR,
        "models": {name: {"path": name, "kind": kind} for name, kind in _KINDS.items()},
        "files": [
            {
                "path": p.relative_to(pack).as_posix(),
                "size_bytes": p.stat().st_size,
                "sha256": sha256_of(p),
            }
            for p in used
        ],
    }
    write_atomically(pack / "pack.json", json.dumps(manifest, indent=2) + "\n")
