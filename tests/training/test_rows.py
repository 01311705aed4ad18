"""Rows on the disk: whole or not at all, and the same after a crash."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arbitrage.core.steps import ModelIdentity, Source, Step, StopReason
from router_training.errors import DatasetInvalid, StorageFailed
from router_training.rows import RowFolder, rows_digest
from tests.training.rows import a_row


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [
        a_row(
            history=(Step("a", Source.TARGET, StopReason.STEP_LENGTH), Step("b", Source.DRAFT)),
            target_texts=("x", "y"),
            target_token_counts=(1, 2),
            target_scores=(0.25, 0.75),
            draft_entropy=None,
            router=ModelIdentity("router", "r7"),
            router_score=0.5,
        ),
        a_row(problem="2 + 2?"),
    ]
    folder = RowFolder(tmp_path)
    folder.append(rows[:1])
    folder.append(rows[1:])
    assert list(folder.read()) == rows
    assert folder.walked_question_ids() == {row.question_id for row in rows}


def test_a_question_that_production_saw_is_still_to_be_walked(tmp_path: Path) -> None:
    folder = RowFolder(tmp_path)
    folder.append([a_row(problem="1?", request_id="of-a-client"), a_row(problem="2?")])
    assert folder.walked_question_ids() == {a_row(problem="2?").question_id}


def test_jobs_that_write_to_one_folder_do_not_meet(tmp_path: Path) -> None:
    for index in range(3):
        RowFolder(tmp_path, (index, 3)).append([a_row(problem=f"{index}?")])
    assert len(list(RowFolder(tmp_path).read())) == 3


def test_a_part_that_was_removed_by_hand_takes_no_other_with_it(tmp_path: Path) -> None:
    folder = RowFolder(tmp_path)
    for number in range(3):
        folder.append([a_row(problem=f"{number}?")])
    min(tmp_path.iterdir()).unlink()
    folder.append([a_row(problem="3?")])
    assert [row.problem for row in folder.read()] == ["1?", "2?", "3?"]


def test_no_rows_make_no_part(tmp_path: Path) -> None:
    RowFolder(tmp_path).append([])
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    folder = RowFolder(tmp_path)
    folder.append([a_row()])
    (part,) = tmp_path.glob("*.parquet")
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(DatasetInvalid, match=part.name):
        list(folder.read())


def test_rows_of_another_format_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question_id": ["a"]}), tmp_path / "part-0000-of-0001-000000.parquet")
    with pytest.raises(DatasetInvalid, match="format none"):
        RowFolder(tmp_path).walked_question_ids()


_FILL = """
import resource, signal, sys
from pathlib import Path
from router_training.errors import StorageFailed
from router_training.rows import RowFolder
from tests.training.rows import a_row
folder = RowFolder(Path(sys.argv[1]))
folder.append([a_row()])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    folder.append([a_row(problem=f"{n}?", draft_text=str(n) * 50) for n in range(500)])
except StorageFailed as error:
    print(error)
    print(len(list(folder.read())))
"""


def test_a_disk_that_is_full_loses_nothing_that_was_written(tmp_path: Path) -> None:
    # A file size limit fails a write in the middle, as a full disk does.
    assert resource.RLIMIT_FSIZE is not None
    found = subprocess.run(
        [sys.executable, "-c", _FILL, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    message, count = found.stdout.splitlines()
    assert "earlier rows are intact" in message
    assert count == "1"
    assert [path.suffix for path in tmp_path.iterdir()] == [".parquet"]


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed, match="earlier rows are intact"):
        RowFolder(tmp_path / "file" / "rows").append([a_row()])


def test_the_digest_knows_the_rows_and_not_their_order() -> None:
    rows = [a_row(problem=f"{n}?") for n in range(5)]
    assert rows_digest(rows) == rows_digest(list(reversed(rows)))
    changed = [replace(rows[0], draft_text="other"), *rows[1:]]
    assert rows_digest(changed) != rows_digest(rows)
    rescored = [replace(rows[0], draft_score=rows[0].draft_score + 1e-7), *rows[1:]]
    assert rows_digest(rescored) == rows_digest(rows)
    assert rows_digest(rows[1:]) != rows_digest(rows)
