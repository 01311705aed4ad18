"""Real problems: how they are loaded, graded, remembered and summed up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.attempt_log import Attempt, AttemptLog
from benchmarks.grading import is_right
from benchmarks.problem_claims import arms, claims
from benchmarks.problem_sets import Question, load_questions, sample
from services.cli.failures import BadInput

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def written(path: Path, *rows: Any) -> str:
    """Writes rows as JSONL and returns the file's name."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("name", "count", "answer"),
    [("gsm8k_test", 1319, "18"), ("math500", 500, "\\frac{\\pi}{2}"), ("olympiadbench", 675, "2")],
)
def test_the_public_sets_are_read_as_they_are_published(name: str, count: int, answer: str) -> None:
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    questions = load_questions(str(path))
    assert len(questions) == count
    assert answer in questions[0].answer
    assert len({question.question_id for question in questions}) == count


def test_any_file_with_questions_and_answers_will_do(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"problem": "1 + 1?", "answer": 2})
    assert load_questions(path) == (Question("0", "1 + 1?", "2"),)


def test_lines_end_where_json_ends_and_an_id_that_is_null_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"question": f"1\u2028+ {number}?", "answer": "2", "idx": None} for number in (1, 2)]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    assert [question.question_id for question in load_questions(str(path))] == ["0", "1"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a", "answer": "b"}], "row 0 has none of question, problem; rename"),
        ([{"question": "a", "answer": ""}], "row 0 has none of final_answer, answer; rename"),
        (["a"], "line 1 is no object"),
        ([], "has no rows"),
        ([{"question": "a", "answer": "b", "id": 7}] * 2, "2 rows have the id '7'; give each"),
    ],
)
def test_a_file_without_them_is_refused(tmp_path: Path, rows: list[Any], said: str) -> None:
    with pytest.raises(BadInput) as raised:
        load_questions(written(tmp_path / "a.jsonl", *rows))
    assert said in str(raised.value)


def test_a_set_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read .* name a JSONL file"):  # noqa: RUF043
        load_questions(str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(BadInput, match="line 1 is no JSON"):
        load_questions(str(tmp_path / "bad.jsonl"))


def test_a_sample_is_drawn_by_its_seed_and_grows() -> None:
    questions = tuple(Question(str(number), "a", "b") for number in range(100))
    few, more = sample(questions, 5, seed=1), sample(questions, 50, seed=1)
    assert more[:5] == few
    assert sample(questions, 5, seed=2) != few
    with pytest.raises(BadInput, match="from 1 to the 100 there are, got 101"):
        sample(questions, 101, seed=1)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("It is \\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}.", "(3, \\pi/2)", True),
        ("First \\boxed{3}, no: \\boxed{4}", "4", True),
        ("The total is $1,234.", "1234", True),
        ("So 6 + 6 = 12.\n\nShe has 12 apples.", "12", True),
        ("\\boxed{12.5}", "12", False),
        ("", "12", False),
        ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", True),
    ],
)
def test_an_answer_counts_by_what_it_means(text: str, answer: str, right: bool) -> None:
    assert is_right(text, answer) is right


def an_attempt(question_id: str, arm: str, **changes: Any) -> Attempt:
    fields = {
        "is_right": True,
        "seconds": 1.0,
        "steps": 4,
        "target_steps": 1,
        "tokens": 40,
        "target_tokens": 30,
        "stop_reason": "end_of_sequence",
        "text": "a",
    }
    return Attempt(question_id, arm, **{**fields, **changes})


def test_attempts_outlive_the_run_and_half_of_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "a.jsonl"
    AttemptLog(path, {"pack": "one that does not begin"})
    log = AttemptLog(path, {"pack": "tiny"})
    log.add(an_attempt("1", "draft_only"))
    with path.open("a") as stream:
        stream.write('{"question_id": "2", "ar')
    again = AttemptLog(path, {"pack": "tiny"})
    assert list(again.attempts) == [("1", "draft_only")]
    again.add(an_attempt("2", "draft_only"))
    assert len(AttemptLog(path, {"pack": "tiny"}).attempts) == 2
    with pytest.raises(BadInput, match="holds attempts of another run"):
        AttemptLog(path, {"pack": "other"})


def test_arms_tell_accuracy_with_its_interval_latency_and_the_targets_share() -> None:
    made = [an_attempt(str(i), "target_only", is_right=i < 9, seconds=i) for i in range(10)]
    made += [an_attempt(str(i), "draft_only", is_right=i < 3) for i in range(10)]
    target, draft = arms(["target_only", "draft_only"], made)
    assert (target["n"], target["accuracy"]) == (10, 0.9)
    # Wilson's interval of 9 in 10.
    assert target["accuracy_interval"] == [0.5958, 0.9821]
    assert target["latency_s"] == {"mean": 4.5, "p50": 4.5, "p95": 8.55}
    assert (draft["target_step_share"], draft["target_token_share"]) == (0.25, 0.75)
    asked, gap = claims(["target_only", "draft_only"], made, 10)
    assert not asked.bar.holds(asked.value)
    assert gap.value == pytest.approx(60.0)
    assert gap.interval is not None
    assert gap.judged == gap.interval[0] > 0


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    problem = "Ann owns {}. How many pens does Ann have?"
    rows = [{"question": problem.format(n), "answer": n} for n in (2, 3)]
    options = ["--dataset", written(tmp_path / "a.jsonl", *rows), "--instruction", ""]
    options += ["--policies", "draft_only,target_only", "--json", str(tmp_path / "r.json")]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.problems", *options, *more]
        return subprocess.run(command, capture_output=True, text=True)

    assert run("--n", "1").returncode == 0
    first = (tmp_path / "r.attempts.jsonl").read_text()
    done = run("--n", "2")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert [line.split(" ")[0] for line in lines[:2]] == ["3/4", "4/4"]
    assert (tmp_path / "r.attempts.jsonl").read_text().startswith(first)
    result = json.loads((tmp_path / "r.json").read_text())
    assert [arm["n"] for arm in result["arms"]] == [2, 2]
    assert result["benchmark"] == "r"
    # Of a log that holds more, a smaller run takes its own.
    assert run("--n", "2", "--policies", "target_only").returncode == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert [(arm["policy"], arm["n"]) for arm in result["arms"]] == [("target_only", 2)]
    elsewhere = run("--n", "2", "--set", "draft.max_batch=2")
    assert elsewhere.returncode == 2
    assert "holds attempts of another run" in elsewhere.stderr
    refused = run("--n", "2", "--max-tokens", "99")
    assert refused.returncode == 2
    assert "holds attempts of another run" in refused.stderr
