"""Questions: where they come from, how they are sampled, and what is said of bad ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from router_training.errors import QuestionsInvalid
from router_training.questions import (
    Columns,
    Question,
    largest_remainder,
    question_id,
    read_questions,
    sample,
    shard,
)


def written(path: Path, *records: object) -> Path:
    """Writes records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def questions(**sizes: int) -> list[Question]:
    """Returns so many questions of each stratum."""
    return [
        Question(question_id(f"{name} {number}"), f"{name} {number}", name)
        for name, size in sizes.items()
        for number in range(size)
    ]


def test_a_file_and_a_folder_hold_the_same_questions(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    file = written(folder / "a.jsonl", {"q": "1 + 1?", "kind": "sum"})
    pq.write_table(pa.table({"q": ["2 * 2?"], "kind": ["product"]}), folder / "b.parquet")
    columns = Columns("q", "kind")
    (alone,) = read_questions(str(file), columns)
    assert alone == Question(question_id("1 + 1?"), "1 + 1?", "sum")
    both = list(read_questions(str(folder), columns))
    assert [question.stratum for question in both] == ["sum", "product"]


@pytest.mark.parametrize(
    ("record", "columns", "said"),
    [
        ({"text": "1?"}, Columns(), "record 1 has no column 'problem' (questions.problem_column)"),
        ({"problem": "1?"}, Columns("problem", "kind"), "questions.stratify_by"),
        ({"problem": " "}, Columns(), "which is no text"),
        ({"problem": 7}, Columns(), "which is no text"),
        ([1], Columns(), "record 1 is no object"),
    ],
)
def test_a_bad_record_is_named_with_its_column(
    tmp_path: Path, record: object, columns: Columns, said: str
) -> None:
    file = written(tmp_path / "q.jsonl", record)
    with pytest.raises(QuestionsInvalid) as caught:
        list(read_questions(str(file), columns))
    assert said in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_line_that_is_no_json_is_named_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_bytes(b'{"problem": "1?"}\n\n{"problem": "\xff"}\n')
    with pytest.raises(QuestionsInvalid, match="line 3 is no JSON"):
        list(read_questions(str(file), Columns()))


@pytest.mark.parametrize("source", ["nowhere.jsonl", "/nowhere", "./nowhere"])
def test_a_path_that_leads_nowhere_is_not_taken_for_a_dataset_of_the_hub(source: str) -> None:
    with pytest.raises(QuestionsInvalid, match="there is no"):
        list(read_questions(source, Columns()))


def test_an_empty_folder_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(QuestionsInvalid, match="holds no"):
        list(read_questions(str(tmp_path), Columns()))


def test_equal_questions_are_walked_once_whatever_their_spacing() -> None:
    twice = [*questions(a=3), Question(question_id(" a  1 "), " a  1 ", "a")]
    assert len(sample(twice, None, 0)) == 3


def test_strata_are_drawn_in_proportion_to_the_last_question() -> None:
    drawn = sample(questions(a=60, b=30, c=10), 7, 0)
    assert Counter(question.stratum for question in drawn) == {"a": 4, "b": 2, "c": 1}
    assert sum(largest_remainder({"a": 3, "b": 3, "c": 3}, 8).values()) == 8


def test_a_larger_sample_holds_the_smaller_one_and_the_seed_decides() -> None:
    every = questions(a=50)
    small, large = sample(every, 10, 1), sample(every, 20, 1)
    assert set(small) < set(large)
    assert set(sample(every, 10, 2)) != set(small)
    assert sample(list(reversed(every)), 10, 1) == small


def test_more_questions_than_there_are_is_an_error() -> None:
    with pytest.raises(QuestionsInvalid, match=r"questions\.count: 5 asked for"):
        sample(questions(a=4), 5, 0)
    with pytest.raises(QuestionsInvalid, match="holds no question"):
        sample([], None, 0)


def test_the_parts_of_several_jobs_are_disjoint_and_complete() -> None:
    every = questions(a=40)
    parts = [shard(every, index, 3) for index in range(3)]
    assert sorted(q.question_id for part in parts for q in part) == sorted(
        q.question_id for q in every
    )
    assert all(parts)
