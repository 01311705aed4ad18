"""Questions with known answers, from a JSONL file or the Hugging Face `datasets` library."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from arbitrage.core.shown import shown
from services.cli.failures import BadInput

# Where a row keeps its question and its answer, in the sets that are known.
_QUESTION_FIELDS: Final = ("question", "problem")
_ANSWER_FIELDS: Final = ("final_answer", "answer")
_ID_FIELDS: Final = ("unique_id", "id", "idx")
# GSM8K ends a worked solution with its answer.
_GSM8K_MARK: Final = "####"
# Short names of public sets: id, configuration, split.
KNOWN: Final[Mapping[str, tuple[str, str | None, str]]] = {
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
}


@dataclass(frozen=True, slots=True)
class Question:
    """One problem and the answer it should come to."""

    question_id: str
    text: str
    answer: str


def load_questions(reference: str) -> tuple[Question, ...]:
    """Returns the questions of a `.jsonl` file, of a known set, or of `id[:config[:split]]`.

    Raises:
        BadInput: there is no such set, or a row has no question or no answer.
    """
    if reference.endswith(".jsonl"):
        rows: Iterable[Mapping[str, Any]] = _rows_of_file(Path(reference))
    else:
        rows = _rows_of_datasets(reference)
    questions = tuple(question_of(row, number, reference) for number, row in enumerate(rows))
    if not questions:
        raise BadInput(f"--dataset {reference}: has no rows; name another")
    [(named, count)] = Counter(question.question_id for question in questions).most_common(1)
    if count > 1:
        raise BadInput(
            f"--dataset {reference}: {count} rows have the id {shown(named)}; give each its own"
        )
    return questions


def question_of(row: Mapping[str, Any], number: int, reference: str) -> Question:
    """Returns what a row asks.

    >>> question_of({"question": "1 + 1?", "answer": "1 + 1 = 2\\n#### 2"}, 0, "a").answer
    '2'
    >>> question_of({"problem": "1 + 1?", "answer": "2", "unique_id": "x/1"}, 0, "a").question_id
    'x/1'

    Raises:
        BadInput
    """
    text = _first(row, _QUESTION_FIELDS, number, reference)
    answer = _first(row, _ANSWER_FIELDS, number, reference)
    if isinstance(answer, list):
        answer = ", ".join(map(str, answer))
    answer = str(answer).rpartition(_GSM8K_MARK)[2].strip()
    named = next(
        (str(row[field]) for field in _ID_FIELDS if row.get(field) is not None), str(number)
    )
    return Question(named, str(text), answer)


def sample(questions: tuple[Question, ...], count: int, seed: int) -> tuple[Question, ...]:
    """Returns `count` of them, drawn by `seed`; more are a superset of fewer.

    Raises:
        BadInput: there are not so many.
    """
    if not 1 <= count <= len(questions):
        raise BadInput(f"--n: must be from 1 to the {len(questions)} there are, got {count}")
    shuffled = list(questions)
    random.Random(seed).shuffle(shuffled)
    return tuple(shuffled[:count])


def _first(row: Mapping[str, Any], fields: Iterable[str], number: int, reference: str) -> Any:
    for field in fields:
        if row.get(field) not in (None, "", []):
            return row[field]
    raise BadInput(
        f"--dataset {reference}: row {number} has none of {', '.join(fields)}; rename its fields"
    )


def _rows_of_file(path: Path) -> list[Mapping[str, Any]]:
    try:
        # JSON may hold other ends of lines than this one.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--dataset {path}: cannot be read ({error}); name a JSONL file") from None
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadInput(f"--dataset {path}: line {number + 1} is no JSON ({error})") from None
        if not isinstance(row, dict):
            raise BadInput(f"--dataset {path}: line {number + 1} is no object")
        rows.append(row)
    return rows


def _rows_of_datasets(reference: str) -> Iterable[Mapping[str, Any]]:
    # Here, because it takes seconds, and files do without.
    import datasets

    name, _, rest = reference.partition(":")
    config, _, split = rest.partition(":")
    known = KNOWN.get(name, (name, None, "test"))
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
            known[0], config or known[1], split=split or known[2]
        )
    except Exception as error:  # noqa: BLE001 - whatever it raises, the set cannot be had
        raise BadInput(
            f"--dataset {reference}: cannot be loaded ({type(error).__name__}: {error}); give a "
            f".jsonl file, one of {', '.join(KNOWN)}, or id:config:split"
        ) from None
    return rows
