"""Reads the questions to walk: a JSON Lines file, a folder of them, or a `datasets` id."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router_training.errors import QuestionsInvalid

_PATTERNS = ("*.jsonl", "*.parquet")


@dataclass(frozen=True, slots=True)
class Question:
    """A problem to walk; equal problems have equal ids. `stratum` is what sampling is even over."""

    question_id: str
    problem: str
    stratum: str = ""


@dataclass(frozen=True, slots=True)
class Columns:
    """Where in a record the problem stands, and the stratum if there is one."""

    problem: str = "problem"
    stratum: str | None = None


def question_id(problem: str) -> str:
    """Returns the id of a problem: spacing apart, the text alone decides it.

    >>> question_id("1 + 1?") == question_id(" 1  + 1?\\n")
    True
    """
    return hashlib.sha256(" ".join(problem.split()).encode()).hexdigest()[:16]


def read_questions(
    source: str, columns: Columns, *, split: str = "train", revision: str | None = None
) -> Iterator[Question]:
    """Yields the questions of a file, a folder, or a `datasets` id, as they stand there.

    Raises:
        QuestionsInvalid: naming place, column and fix.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for pattern in _PATTERNS for file in path.glob(pattern))
        if not files:
            raise QuestionsInvalid(
                f"questions.source: {source!r} holds no {' or '.join(_PATTERNS)}; "
                "put question files into it or name another folder"
            )
        for file in files:
            yield from _questions_of(file, columns)
    elif path.is_file():
        yield from _questions_of(path, columns)
    elif path.suffix in {".jsonl", ".parquet"} or path.is_absolute() or source.startswith("."):
        raise QuestionsInvalid(f"questions.source: there is no {source!r}; correct the path")
    else:
        yield from _checked(_hub_records(source, split, revision), source, columns)


def sample(questions: Iterable[Question], count: int | None, seed: int) -> list[Question]:
    """Returns `count` distinct questions, even over strata by largest remainder, by a seeded draw.

    Within a stratum the draw orders by a hash, so a larger `count` keeps what a smaller one drew.
    None takes all.

    Raises:
        QuestionsInvalid: there are fewer distinct questions, or none.
    """
    strata: dict[str, dict[str, Question]] = defaultdict(dict)
    seen: set[str] = set()
    for question in questions:
        if question.question_id not in seen:
            seen.add(question.question_id)
            strata[question.stratum][question.question_id] = question
    if not seen:
        raise QuestionsInvalid("questions.source: it holds no question; name another source")
    if count is not None and count > len(seen):
        raise QuestionsInvalid(
            f"questions.count: {count} asked for, but the source holds {len(seen)} distinct "
            "questions; lower the count or add questions"
        )
    shares = largest_remainder({name: len(some) for name, some in strata.items()}, count)
    drawn = [
        question
        for name, some in strata.items()
        for question in sorted(some.values(), key=lambda q: _draw(seed, q.question_id))[
            : shares[name]
        ]
    ]
    return sorted(drawn, key=lambda question: _draw(seed, question.question_id))


def largest_remainder(sizes: Mapping[str, int], count: int | None) -> dict[str, int]:
    """Splits `count` over strata in proportion to their sizes, leftovers to largest remainders.

    >>> largest_remainder({"a": 60, "b": 30, "c": 10}, 7)
    {'a': 4, 'b': 2, 'c': 1}
    >>> largest_remainder({"a": 2, "b": 1}, None)
    {'a': 2, 'b': 1}
    """
    if count is None:
        return dict(sizes)
    total = sum(sizes.values())
    shares = {name: count * size // total for name, size in sizes.items()}
    # Integers, so that no rounding decides; names break ties, whatever order strata came in.
    order = sorted(sizes, key=lambda name: (-(count * sizes[name] % total), name))
    for name in order[: count - sum(shares.values())]:
        shares[name] += 1
    return shares


def shard(questions: Sequence[Question], index: int, count: int) -> list[Question]:
    """Returns the part of the questions that job `index` of `count` walks.

    The id alone decides, so the parts are disjoint and together complete whatever else changes.
    """
    return [q for q in questions if int(q.question_id, 16) % count == index]


def _draw(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}\0{name}".encode()).hexdigest()


def _questions_of(path: Path, columns: Columns) -> Iterator[Question]:
    read = _parquet_records if path.suffix == ".parquet" else _json_records
    return _checked(read(path), str(path), columns)


def _json_records(path: Path) -> Iterator[Any]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip():
                    yield json.loads(line)
            except ValueError as error:  # bad UTF-8 too
                raise QuestionsInvalid(
                    f"{path}: line {number} is no JSON ({error}); correct or remove it"
                ) from None


def _parquet_records(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        yield from pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise QuestionsInvalid(f"{path}: it cannot be read ({error}); replace it") from None


def _hub_records(source: str, split: str, revision: str | None) -> Iterator[Any]:
    import datasets

    try:
        yield from datasets.load_dataset(source, split=split, revision=revision)
    except Exception as error:  # noqa: BLE001 - what `datasets` raises has no common class
        raise QuestionsInvalid(
            f"questions.source: {source!r} is neither a file nor a folder, and `datasets` cannot "
            f"load its split {split!r} ({type(error).__name__}: {error}); correct the name, or "
            "check the network and HF_TOKEN"
        ) from None


def _checked(records: Iterable[Any], place: str, columns: Columns) -> Iterator[Question]:
    for number, record in enumerate(records, start=1):
        if not isinstance(record, Mapping):
            raise QuestionsInvalid(f"{place}: record {number} is no object; give one per line")
        problem = _text(record, columns.problem, "problem_column", place, number)
        stratum = ""
        if columns.stratum is not None:
            stratum = str(_column(record, columns.stratum, "stratify_by", place, number))
        yield Question(question_id(problem), problem, stratum)


def _column(record: Mapping[str, Any], name: str, field: str, place: str, number: int) -> Any:
    if name not in record:
        raise QuestionsInvalid(
            f"{place}: record {number} has no column {name!r} (questions.{field}); it has "
            f"{', '.join(map(repr, record)) or 'none'}; name one of these"
        )
    return record[name]


def _text(record: Mapping[str, Any], name: str, field: str, place: str, number: int) -> str:
    value = _column(record, name, field, place, number)
    if not isinstance(value, str) or not value.strip():
        raise QuestionsInvalid(
            f"{place}: record {number} has {value!r:.40} in column {name!r} "
            f"(questions.{field}), which is no text; correct or remove the record"
        )
    return value
