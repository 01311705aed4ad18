"""The rows of a dataset and where they lie: Parquet parts, written whole or not at all.

A part holds whole questions only and is never changed. What is not in a part was not collected:
a run that was killed walks the questions again that it had not finished writing, and no others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from arbitrage.core.steps import ModelIdentity, Source, Step, StopReason
from router_training.errors import DatasetInvalid, StorageFailed

FORMAT_VERSION: Final = 1
_VERSION_KEY: Final = b"arbitrage.rows.format_version"
_MODEL: Final = pa.struct([("model_id", pa.string()), ("revision", pa.string())])
_STEP: Final = pa.struct(
    [("text", pa.string()), ("source", pa.string()), ("stop_reason", pa.string())]
)
SCHEMA: Final = pa.schema(
    [
        ("request_id", pa.string()),
        ("question_id", pa.string()),
        ("source", pa.string()),
        ("step_index", pa.int32()),
        ("problem", pa.string()),
        ("history", pa.list_(_STEP)),
        ("draft_text", pa.string()),
        ("draft_token_count", pa.int32()),
        ("draft_entropy", pa.float64()),
        ("target_texts", pa.list_(pa.string())),
        ("target_token_counts", pa.list_(pa.int32())),
        ("draft_score", pa.float64()),
        ("target_scores", pa.list_(pa.float64())),
        ("advantage", pa.float64()),
        ("label", pa.int8()),
        ("prm", _MODEL),
        ("draft", _MODEL),
        ("target", _MODEL),
        ("router", _MODEL),
        ("router_score", pa.float64()),
        ("prefix_policy", pa.string()),
        ("propensity", pa.float64()),
        ("seed", pa.int64()),
        ("code_version", pa.string()),
    ],
    metadata={_VERSION_KEY: str(FORMAT_VERSION).encode()},
)


@dataclass(frozen=True, slots=True)
class Row:
    """What draft and target wrote after one prefix, and what the PRM says of both.

    `request_id` names the walk; `source` is the question's stratum or the feedback it came from;
    `target_texts` has one step per sample; `advantage` is the mean of `target_scores` minus
    `draft_score`, and `label` whether it is above 0. `draft_entropy` is a mean in nats over the
    draft's first tokens. `propensity` is the chance with which this step came to be a row.
    """

    request_id: str
    question_id: str
    source: str
    step_index: int
    problem: str
    history: tuple[Step, ...]
    draft_text: str
    draft_token_count: int
    draft_entropy: float | None
    target_texts: tuple[str, ...]
    target_token_counts: tuple[int, ...]
    draft_score: float
    target_scores: tuple[float, ...]
    advantage: float
    label: int
    prm: ModelIdentity
    draft: ModelIdentity
    target: ModelIdentity
    router: ModelIdentity | None
    router_score: float | None
    prefix_policy: str
    propensity: float
    seed: int
    code_version: str

    def to_record(self) -> dict[str, Any]:
        """Returns the row as Parquet has it."""
        record = {field: getattr(self, field) for field in Row.__slots__}
        record["history"] = [
            {"text": s.text, "source": s.source.value, "stop_reason": s.stop_reason.value}
            for s in self.history
        ]
        for role in ("prm", "draft", "target", "router"):
            model = record[role]
            record[role] = None if model is None else dataclasses.asdict(model)
        return record

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Row:
        """Returns the row that `to_record` was given."""
        fields = dict(record)
        fields["history"] = tuple(
            Step(s["text"], Source(s["source"]), StopReason(s["stop_reason"]))
            for s in record["history"]
        )
        for role in ("prm", "draft", "target", "router"):
            model = record[role]
            fields[role] = None if model is None else ModelIdentity(**model)
        for name in ("target_texts", "target_token_counts", "target_scores"):
            fields[name] = tuple(record[name])
        return cls(**fields)


class RowFolder:
    """The parts of one dataset. Jobs that write to it at once differ in `shard`."""

    def __init__(self, folder: Path, shard: tuple[int, int] = (0, 1)) -> None:
        self._folder = folder
        self._prefix = f"part-{shard[0]:04d}-of-{shard[1]:04d}-"

    def append(self, rows: Sequence[Row]) -> None:
        """Writes one more part, on the disk when this returns. No rows, no part.

        Raises:
            StorageFailed: nothing of it was written; earlier parts are as they were.
        """
        if rows:
            # Behind the last one: a part that was removed by hand leaves a gap, and others stay.
            numbers = [int(path.stem.removeprefix(self._prefix)) for path in self._own_parts()]
            number = max(numbers, default=-1) + 1
            write_rows(self._folder / f"{self._prefix}{number:06d}.parquet", rows)

    def read(self) -> Iterator[Row]:
        """Yields every row of every part.

        Raises:
            DatasetInvalid: a part cannot be read.
        """
        for path in self._parts():
            yield from read_rows(path)

    def walked_question_ids(self) -> set[str]:
        """Returns the questions that were walked; rows of production are of other requests."""
        return {
            record["question_id"]
            for path in self._parts()
            for record in _records(path, ["question_id", "request_id"])
            if record["request_id"].startswith(record["question_id"])
        }

    def first(self) -> Row | None:
        """Returns some row; None where there is none yet."""
        return next(self.read(), None)

    def _parts(self) -> list[Path]:
        return sorted(self._folder.glob("part-*.parquet"))

    def _own_parts(self) -> list[Path]:
        return sorted(self._folder.glob(f"{self._prefix}*.parquet"))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes a file of rows, whole or not at all, on the disk when this returns.

    Raises:
        StorageFailed: there is no such file now, and all others are as they were.
    """
    table = pa.Table.from_pylist([row.to_record() for row in rows], schema=SCHEMA)
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            pq.write_table(table, stream, compression="zstd")
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        _sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StorageFailed(
            f"{path}: rows cannot be written ({error.strerror or error}); earlier rows are "
            "intact: make room or correct the folder, and run the same command again"
        ) from None


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a file.

    Raises:
        DatasetInvalid: it cannot be read.
    """
    return [Row.from_record(record) for record in _records(path, None)]


def rows_digest(rows: Iterable[Row]) -> str:
    """Returns the sha256 of rows, whatever their order and the parts they lie in.

    Scores count to two decimals: a service computes their last bits differently in other company
    of the batch. What no label depends on, and the code's version, does not count.
    """
    lines = []
    for row in rows:
        record = row.to_record()
        for name in ("code_version", "advantage", "router_score", "draft_entropy"):
            del record[name]
        record["draft_score"] = round(row.draft_score, 2)
        record["target_scores"] = [round(score, 2) for score in row.target_scores]
        lines.append(json.dumps(record, sort_keys=True))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _records(path: Path, columns: list[str] | None) -> list[dict[str, Any]]:
    try:
        file = pq.ParquetFile(path)
        version = (file.schema_arrow.metadata or {}).get(_VERSION_KEY, b"none").decode()
        if version != str(FORMAT_VERSION):
            raise DatasetInvalid(
                f"{path}: rows of format {version}; this program reads {FORMAT_VERSION}; collect "
                "into a new folder"
            )
        records: list[dict[str, Any]] = file.read(columns=columns).to_pylist()
    except (OSError, pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DatasetInvalid(
            f"{path}: it cannot be read ({error}); remove it, and collect again to replace it"
        ) from None
    return records


def _sync(folder: Path) -> None:
    # A rename is on the disk once its folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
