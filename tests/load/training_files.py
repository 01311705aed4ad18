"""What training reads: production records and the configuration of a run."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from arbitrage.v1 import feedback_pb2
from router_training.config import parsed_overrides, read_config
from router_training.errors import ConfigInvalid, DatasetInvalid
from router_training.feedback import rows_from_feedback
from router_training.rows import RowFolder
from services.rpc.feedback_log import read_feedback
from tests.load.driver import ACCEPTED, Boundary, Wrong, legible
from tests.load.odd_values import OddValues, document

_ROOT = Path(__file__).resolve().parents[2]


def training_files(folder: Path) -> list[Boundary]:
    """Returns the boundaries; files are written to `folder`."""
    return [
        _feedback(folder / "feedback"),
        _configs(folder / "configs"),
        Boundary("training overrides", 2, _overrides, _read_overrides),
    ]


def _feedback(folder: Path) -> Boundary:
    folder.mkdir()
    path = folder / "feedback-1.jsonl"
    step = {"text": "a", "stop_reason": "STOP_REASON_SEPARATOR", "token_count": 3}
    good = {
        "request_id": "r",
        "observed_at": "2025-01-01T00:00:00Z",
        "problem": "1 + 1?",
        "steps": [{"text": "b", "source": "SOURCE_DRAFT", "stop_reason": "STOP_REASON_SEPARATOR"}],
        "draft_step": step,
        "target_steps": [step],
        "draft_score": 0.25,
        "target_scores": [0.75],
        "router_score": 0.5,
        "propensity": 0.5,
        "sampling": {"temperature": 0.5, "seed": "7"},
    }
    assert set(good) <= set(feedback_pb2.ObservedStep.DESCRIPTOR.fields_by_name)

    def draw(odd: OddValues) -> bytes:
        lines = [json.dumps(good).encode(), document(odd, good)]
        odd.coin.shuffle(lines)
        return b"\n".join(lines) + odd.one_of((b"\n", b""))

    def attempt(content: bytes) -> str:
        path.write_bytes(content)
        try:
            for _ in read_feedback(folder):
                pass
        except ValueError as error:
            if str(path) not in legible(str(error)):
                raise Wrong(f"the error names no file: {error}") from error
            return type(error).__name__
        rows = folder / "rows"
        try:
            rows_from_feedback(str(folder), RowFolder(rows))
        except DatasetInvalid as error:
            legible(str(error))
            return type(error).__name__
        finally:
            for part in rows.glob("*"):
                part.unlink()
        return ACCEPTED

    return Boundary("feedback", 4, draw, attempt)


def _configs(folder: Path) -> Boundary:
    folder.mkdir()
    path = folder / "config.toml"
    text = (_ROOT / "router_training" / "configs" / "tiny.toml").read_text(encoding="utf-8")
    good = tomllib.loads(text)

    def draw(odd: OddValues) -> bytes:
        match odd.coin.choices(("changed", "odd", "bytes", "deep"), (70, 10, 19, 1))[0]:
            case "changed":
                return _toml(odd.changed_json(good)).encode("utf-8", "surrogatepass")
            case "odd":
                return _toml(odd.json()).encode("utf-8", "surrogatepass")
            case "bytes":
                return odd.changed_bytes(text.encode())
            case _:
                return b"work = " + b"[" * odd.one_of((50, 500, 5_000))

    def attempt(content: bytes) -> str:
        path.write_bytes(content)
        try:
            read_config(path)
        except ConfigInvalid as error:
            for line in str(error).splitlines():
                legible(line)
            return type(error).__name__
        return ACCEPTED

    return Boundary("training configuration", 6, draw, attempt)


def _toml(value: Any) -> str:
    """Returns a document with the keys of `value` at its top."""
    fields = value if isinstance(value, dict) else {"work": value}
    return "\n".join(f"{_toml_text(key)} = {_toml_value(inner)}" for key, inner in fields.items())


def _toml_value(value: Any) -> str:
    match value:
        case dict():
            pairs = (f"{_toml_text(key)} = {_toml_value(inner)}" for key, inner in value.items())
            return f"{{ {', '.join(pairs)} }}"
        case [[*inner]]:
            # Without recursion: some lists in lists are deeper than this program may call.
            depth = 1
            while len(inner) == 1 and isinstance(inner[0], list):
                depth, inner = depth + 1, inner[0]
            return "[" * depth + _toml_value(inner) + "]" * depth
        case list():
            return f"[{', '.join(map(_toml_value, value))}]"
        case str():
            return _toml_text(value)
        case bool() | None:
            return "true" if value else "false"
        case _:
            return repr(value)


def _toml_text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def _overrides(odd: OddValues) -> list[str]:
    keys = ("train.seed", "promote.location", "services", "a.b.c", "", ".", odd.text())
    return [
        f"{odd.one_of(keys)}{odd.one_of(('=', '=', '', '=='))}{odd.text(may_be_broken=True)}"
        for _ in range(odd.coin.randint(1, 3))
    ]


def _read_overrides(pairs: list[str]) -> str:
    path = _ROOT / "router_training" / "configs" / "tiny.toml"
    try:
        read_config(path, parsed_overrides(pairs))
    except ConfigInvalid as error:
        for line in str(error).splitlines():
            legible(line)
        return type(error).__name__
    return ACCEPTED
