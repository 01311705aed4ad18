"""Results have one shape, and the README says what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.report import BEGIN, END, markdown, with_results
from benchmarks.results import RESULTS, ROOT, Bar, Claim, Result, bootstrap

KEYS = {"benchmark", "command", "commit", "date", "machine", "seeds", "claims"}
CLAIM_KEYS = {"name", "value", "interval", "unit", "bar", "holds", "n", "how"}


def claim(value: float, bar: Bar, judged: float | None = None) -> Claim:
    return Claim("a ratio", value, "×", "measured", 9, bar, (0.5, 2.5), judged)


@pytest.mark.parametrize(
    ("value", "bar", "holds"),
    [
        (1.5, Bar("at most", 1.5), True),
        (1.6, Bar("at most", 1.5), False),
        (1.5, Bar("at least", 1.5), True),
        (1.4, Bar("at least", 1.5), False),
        (1.5, Bar("above", 1.5), False),
        (1.6, Bar("above", 1.5), True),
        (float("nan"), Bar("above", 1.5), False),
    ],
)
def test_a_claim_holds_only_if_its_value_meets_the_bar(value: float, bar: Bar, holds: bool) -> None:
    assert claim(value, bar).as_json()["holds"] is holds


def test_a_claim_on_an_interval_is_judged_by_its_end() -> None:
    assert claim(0.9, Bar("above", 0.6), judged=0.5).as_json()["holds"] is False


def test_a_bar_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="roughly"):
        Bar("roughly", 1.0).holds(1.0)


def test_a_result_is_written_whole_with_machine_date_and_commit(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.json"
    Result("x", (1,), (claim(1.0, Bar("at least", 2.0)),)).write(path)
    found = json.loads(path.read_text())
    assert set(found) == KEYS
    assert set(found["claims"][0]) == CLAIM_KEYS
    assert found["claims"][0]["holds"] is False
    assert found["machine"]["cores"] >= 1
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_a_claim_that_does_not_hold_stays_in_the_readme() -> None:
    result = Result("x", (), (claim(1.0, Bar("at least", 2.0)),)).as_json()
    assert "| **no** |" in markdown([result])


def test_the_readme_needs_its_markers() -> None:
    assert with_results(f"a {BEGIN} old {END} b", "new") == f"a {BEGIN}\nnew\n{END} b"
    with pytest.raises(SystemExit):
        with_results("no markers", "new")


def test_committed_results_have_the_one_shape_and_the_readme_shows_them() -> None:
    paths = sorted(RESULTS.glob("*.json"))
    assert {path.stem for path in paths} >= {"ablation", "decoding", "frontier", "tiny"}
    for path in paths:
        result = json.loads(path.read_text())
        assert set(result) >= KEYS
        assert result["claims"]
        assert all(set(found) == CLAIM_KEYS for found in result["claims"])
    command = [sys.executable, "-m", "benchmarks.report", "--check"]
    check = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stderr


def test_a_bootstrap_interval_covers_the_mean_and_shrinks_with_more_problems() -> None:
    def width(count: int) -> float:
        values = np.arange(count) % 2
        low, high = bootstrap(count, lambda drawn: float(values[drawn].mean()), seed=1, rounds=400)
        assert low < 0.5 < high
        return high - low

    assert width(400) < width(40)
