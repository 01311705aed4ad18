"""Rows of an inference of the Open Inference Protocol: a step to judge, and its judgement.

A request has one BYTES tensor of shape [n] for each text of a row, an answer one tensor of shape
[n] for each figure. What a row's history holds goes as JSON, because its length differs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import uuid4

import numpy as np
from kserve import InferInput, InferOutput, InferRequest, InferResponse
from kserve.errors import InvalidInput

from arbitrage.core.shown import shown
from arbitrage.core.steps import Source, Step

PRM_INPUTS: Final = ("problem", "steps")
ROUTER_INPUTS: Final = ("problem", "steps", "candidate")
# Name, type and how it is kept.
_OUTPUTS: Final = (
    ("score", "FP32", np.float32),
    ("prefill_token_count", "INT64", np.int64),
    ("cached_token_count", "INT64", np.int64),
    ("truncated_token_count", "INT64", np.int64),
)
_REVISION: Final = "revision"


class OddAnswer(Exception):
    """An answer is not made as it should be. The message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a model makes of one row; `revision` stands for its weights."""

    score: float
    revision: str
    prefill_token_count: int = 0
    cached_token_count: int = 0
    truncated_token_count: int = 0


def input_types(names: Sequence[str]) -> list[dict[str, object]]:
    """Returns the metadata of a request's tensors."""
    return [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in names]


def output_types() -> list[dict[str, object]]:
    """Returns the metadata of an answer's tensors."""
    types = [*((name, kind) for name, kind, _ in _OUTPUTS), (_REVISION, "BYTES")]
    return [{"name": name, "datatype": kind, "shape": [-1]} for name, kind in types]


def steps_to_json(steps: Sequence[Step]) -> str:
    """Returns a history as a row holds it."""
    return json.dumps(
        [{"text": step.text, "source": step.source.value} for step in steps], ensure_ascii=False
    )


def steps_from_json(text: str, row: int) -> tuple[Step, ...]:
    """Returns the steps of a row; one without a source counts as the draft's.

    Raises:
        InvalidInput
    """
    place = f"steps[{row}]"
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{place}: is no JSON ({error}); send an array of steps") from None
    if not isinstance(entries, list):
        raise InvalidInput(f"{place}: expected an array of steps, got {shown(entries)}")
    return tuple(_step(entry, f"{place}[{index}]") for index, entry in enumerate(entries))


def _step(entry: object, place: str) -> Step:
    fields = {"text": entry} if isinstance(entry, str) else entry
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise InvalidInput(
            f'{place}: expected a text, or {{"text": …, "source": "draft" or "target"}}, got '
            f"{shown(entry)}"
        )
    text = _whole(fields["text"], place)
    try:
        return Step(text, Source(fields.get("source", "draft")))
    except ValueError:
        raise InvalidInput(
            f"{place}.source: expected draft or target, got {shown(fields['source'])}"
        ) from None


def request_of(model: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> InferRequest:
    """Returns the request that judges `rows`, each a text for every name."""
    columns = zip(*rows, strict=True)
    inputs = [
        InferInput(name, [len(rows)], "BYTES", data=[text.encode() for text in column])
        for name, column in zip(names, columns, strict=True)
    ]
    return InferRequest(model_name=model, infer_inputs=inputs)


def rows_of(request: InferRequest, names: Sequence[str], max_rows: int) -> list[tuple[str, ...]]:
    """Returns the rows of a request.

    Raises:
        InvalidInput: a tensor is absent, of another kind or length, or no UTF-8.
    """
    given = {tensor.name: tensor for tensor in request.inputs}
    if unknown := sorted(set(given) - set(names)):
        raise InvalidInput(f"{unknown[0]}: no such input; send {', '.join(names)}")
    columns = []
    for name in names:
        if name not in given:
            raise InvalidInput(f"{name}: is missing; send {', '.join(names)}, each BYTES of [n]")
        columns.append(_texts(given[name], max_rows))
    if len({len(column) for column in columns}) != 1:
        lengths = ", ".join(f"{n} {len(c)}" for n, c in zip(names, columns, strict=True))
        raise InvalidInput(f"{names[0]}: all inputs have the same length n, got {lengths}")
    return list(zip(*columns, strict=True))


def _texts(tensor: InferInput, max_rows: int) -> list[str]:
    if tensor.datatype != "BYTES" or len(tensor.shape) != 1:
        raise InvalidInput(
            f"{tensor.name}: expected BYTES of shape [n], got {tensor.datatype} of "
            f"{list(tensor.shape)}"
        )
    if not 1 <= tensor.shape[0] <= max_rows:
        raise InvalidInput(
            f"{tensor.name}: expected 1 to {max_rows} rows, got {tensor.shape[0]}; send several "
            "requests, or raise ARBITRAGE_KSERVE_MAX_ROWS"
        )
    try:
        values = tensor.as_numpy().tolist()
    except ValueError:
        # numpy's, about another number of values than the shape says.
        raise InvalidInput(
            f"{tensor.name}: has another number of values than the {tensor.shape[0]} of its shape"
        ) from None
    return [_text(value, f"{tensor.name}[{row}]") for row, value in enumerate(values)]


def _text(value: object, place: str) -> str:
    try:
        text = value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{place}: is no UTF-8 ({error}); send text") from None
    if not isinstance(text, str):
        raise InvalidInput(f"{place}: expected a text, got {shown(text)}")
    return _whole(text, place)


def _whole(text: str, place: str) -> str:
    """Returns a text that can be encoded; JSON's escapes may make half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise InvalidInput(
            f"{place}: has half a character, {half!a}, at {error.start}; send whole ones"
        ) from None
    return text


def response_of(
    request: InferRequest, model: str, judgements: Sequence[Judgement]
) -> InferResponse:
    """Returns the answer with a judgement for each row."""
    count = len(judgements)
    outputs = []
    for name, kind, dtype in _OUTPUTS:
        output = InferOutput(name, [count], kind)
        values = [getattr(judgement, name) for judgement in judgements]
        output.set_data_from_numpy(np.array(values, dtype), binary_data=False)
        outputs.append(output)
    revision = InferOutput(_REVISION, [count], "BYTES")
    revisions: Any = [judgement.revision.encode() for judgement in judgements]
    revision.set_data_from_numpy(np.array(revisions, np.object_), binary_data=False)
    outputs.append(revision)
    # Callers need not name a request, but an answer has to have a name.
    return InferResponse(request.id or uuid4().hex, model, outputs)


def judgements_of(response: InferResponse, count: int) -> list[Judgement]:
    """Returns the judgements of an answer; only score and revision have to be there.

    Raises:
        OddAnswer
    """
    given = {output.name: output.as_numpy() for output in response.outputs}
    columns: dict[str, list[Any]] = {}
    for name in (*(name for name, _, _ in _OUTPUTS), _REVISION):
        values = given.get(name)
        if values is None:
            if name in {"score", _REVISION}:
                raise OddAnswer(f"has no output {name}")
            continue
        if values.shape != (count,):
            raise OddAnswer(f"has {name} of shape {list(values.shape)}, for {count} rows")
        columns[name] = values.tolist()
    if not all(0.0 <= score <= 1.0 for score in columns["score"]):
        raise OddAnswer("has a score outside 0 to 1")
    columns[_REVISION] = [
        value.decode(errors="replace") if isinstance(value, bytes) else str(value)
        for value in columns[_REVISION]
    ]
    return [Judgement(**{n: c[row] for n, c in columns.items()}) for row in range(count)]
