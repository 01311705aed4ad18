"""The frontier's arithmetic on cases worked by hand, and a coarse run of the whole of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.frontier_claims import Frontier, claims
from benchmarks.frontier_curves import (
    Ends,
    Outcomes,
    accuracy_at,
    area,
    latency_at,
    resampled,
    speedups,
    spread,
)

ROOT = Path(__file__).resolve().parents[2]
ENDS = Ends(0.4, 0.8)


def arms(rates: list[float], accuracies: list[float], latencies: list[float]) -> Outcomes:
    """Returns arms on ten problems of ten steps with these figures."""
    n = 10
    ones = np.ones((len(rates), n))
    solved = np.array([[float(i < round(a * n)) for i in range(n)] for a in accuracies])
    escalated = np.array(rates)[:, None] * 10 * ones
    return Outcomes(
        tuple(rates),
        solved,
        10 * ones,
        10 * ones,
        escalated,
        escalated / 2,
        np.array(latencies)[:, None] * ones,
    )


WHOLE = np.ones(10)


def test_a_curve_runs_between_the_two_models_alone() -> None:
    points = arms([0.5], [0.8], [1.0]).drawn(WHOLE)
    found = accuracy_at(points, ENDS, np.array([0.0, 0.25, 0.5, 0.75, 1.0]))
    assert found == pytest.approx([0.4, 0.6, 0.8, 0.8, 0.8])
    assert area(points, ENDS) == pytest.approx(0.5 * 0.6 + 0.5 * 0.8)


def test_a_coin_has_the_area_of_the_straight_line() -> None:
    coin = arms([0.25, 0.5, 0.75], [0.5, 0.6, 0.7], [1, 2, 3]).drawn(WHOLE)
    assert area(coin, ENDS) == pytest.approx(0.6)


def test_waste_is_a_share_of_escalations_and_of_steps() -> None:
    points = arms([0.4], [0.8], [1.0]).drawn(WHOLE)
    assert points.waste[0] == pytest.approx(0.5)
    assert points.wasted_of_steps[0] == pytest.approx(0.2)


def test_latency_at_an_accuracy_is_the_least_that_reaches_it() -> None:
    # The third arm is slower than the second and no better.
    points = arms([0.1, 0.2, 0.3], [0.5, 0.8, 0.7], [1.0, 2.0, 3.0]).drawn(WHOLE)
    assert latency_at(points, np.array([0.5, 0.65, 0.8])) == pytest.approx([1.0, 1.5, 2.0])
    assert np.isnan(latency_at(points, np.array([0.9]))[0])


def test_a_policy_twice_as_slow_is_so_at_every_accuracy() -> None:
    quick = arms([0.1, 0.3], [0.5, 0.8], [1.0, 2.0]).drawn(WHOLE)
    slow = arms([0.2, 0.5], [0.5, 0.8], [2.0, 4.0]).drawn(WHOLE)
    assert speedups(slow, quick) == pytest.approx(2.0)


def test_resampling_keeps_what_is_paired_together() -> None:
    better = np.array([1.0] * 6 + [0.0] * 4)
    worse = better.copy()
    worse[0] = 0.0
    low, high = resampled(10, lambda w: float((better - worse) @ w / w.sum()), 0, 500)
    # One problem decides; unpaired, the interval would reach far below 0.
    assert low >= 0.0
    assert 0.1 <= high <= 0.4


def test_claims_hold_only_where_the_whole_interval_does() -> None:
    draft, target = arms([0.0], [0.4], [0.1]), arms([1.0], [0.8], [3.0])
    good = arms([0.2, 0.4], [0.7, 0.8], [1.0, 1.5])
    curves = {
        "arbitrage": good,
        "rsd": arms([0.4, 0.8], [0.6, 0.8], [1.5, 2.5]),
        "random": arms([0.5], [0.6], [2.0]),
        "oracle": good,
    }
    found = claims(Frontier(draft, target, curves, 0, 200))
    assert [claim.as_json()["holds"] for claim in found[:2]] == [True, True]
    same = claims(Frontier(draft, target, {**curves, "rsd": good}, 0, 200))
    assert same[0].value == 0.0
    assert not same[0].as_json()["holds"]


def test_thresholds_are_spread_over_what_scores_there_are() -> None:
    crowded = [0.001] * 50 + [0.002] * 50 + [0.9] * 10
    assert spread(crowded, 11) == (0.001, 0.002, 0.9)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_quick_run_draws_the_frontier_of_the_running_system(tmp_path: Path) -> None:
    result, plot = tmp_path / "frontier.json", tmp_path / "frontier.png"
    command = [sys.executable, "-m", "benchmarks.frontier", "--quick", "--problems", "12"]
    done = subprocess.run(
        [*command, "--json", str(result), "--plot", str(plot)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text())
    assert len(found["claims"]) == 4
    by_policy: dict[str, list[dict[str, float]]] = {}
    for arm in found["arms"]:
        by_policy.setdefault(arm["policy"], []).append(arm)
    assert len(by_policy) == 7
    assert by_policy["draft_only"][0]["escalation_rate"] == 0.0
    for arm in found["arms"]:
        assert 0.0 <= arm["escalation_rate"] <= 1.0
        assert 0.0 <= arm["wasted_escalations"] <= 1.0
        assert arm["mean_latency_s"] > 0.0
    # A lower threshold escalates more, a higher acceptance score too.
    rates = [arm["escalation_rate"] for arm in by_policy["arbitrage"]]
    assert rates[0] > rates[-1]
    rates = [arm["escalation_rate"] for arm in by_policy["rsd"]]
    assert rates[0] < rates[-1]
    # Accepting everything solves what the draft alone does.
    assert by_policy["arbitrage"][-1]["accuracy"] == by_policy["draft_only"][0]["accuracy"]
    assert plot.stat().st_size > 20_000


def test_an_unknown_pack_is_one_clear_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.frontier", "--pack", "nosuch"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "unknown model pack 'nosuch'" in done.stderr
    assert "Traceback" not in done.stderr
