"""Figures of a router: right on cases worked by hand, and honest about their uncertainty."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from router_training.metrics import (
    Judged,
    area_under_roc,
    bootstrap,
    budget_area,
    budget_curve,
    calibration_error,
    label_accuracy,
    paired_bootstrap,
    shifted,
    spearman,
)


def judged(scores: np.ndarray, *, rows_per_question: int = 2, seed: int = 0) -> Judged:
    """Returns rows whose advantage follows the scores, more or less."""
    rng = np.random.default_rng(seed)
    n = len(scores)
    draft = rng.uniform(0, 1, n)
    target = np.clip(draft + scores - 0.5 + rng.normal(0, 0.2, n), 0, 1)
    return Judged(np.arange(n) // rows_per_question, draft, target, scores)


SCORES = np.random.default_rng(3).uniform(0, 1, 400)


def test_rank_correlation_is_that_of_scipy() -> None:
    rows = judged(SCORES)
    expected = spearmanr(rows.scores, rows.advantages)[0]
    assert spearman(rows.scores, rows.advantages) == pytest.approx(expected)
    assert np.isnan(spearman(np.zeros(5), np.arange(5.0)))
    tied = np.array([1.0, 2.0, 2.0, 4.0]), np.array([1.0, 3.0, 2.0, 4.0])
    assert spearman(*tied) == pytest.approx(0.9486832980505138)


def test_the_area_counts_a_tie_as_half() -> None:
    labels = np.array([True, False])
    assert area_under_roc(np.array([0.5, 0.5]), labels) == 0.5
    assert np.isnan(area_under_roc(np.array([0.1, 0.2]), np.array([True, True])))


def test_label_accuracies_are_about_their_label_alone() -> None:
    rows = Judged(
        np.arange(4), np.array([0.5] * 4), np.array([0.9, 0.9, 0.5, 0.1]), np.array([1, 0, 0, 0.0])
    )
    assert label_accuracy(rows, True, 0.5) == 0.5
    assert label_accuracy(rows, False, 0.5) == 1.0


def test_the_oracles_curve_is_above_every_other_and_all_end_alike() -> None:
    rows = judged(SCORES)
    oracle = budget_curve(rows.by(rows.advantages))
    mine, coin = budget_curve(rows), budget_curve(rows.by(np.zeros(len(SCORES))))
    assert (oracle >= mine - 1e-12).all()
    assert (oracle >= coin - 1e-12).all()
    assert oracle[0] == mine[0] == coin[0] == pytest.approx(rows.draft_scores.mean())
    assert oracle[-1] == pytest.approx(mine[-1]) == pytest.approx(rows.target_scores.mean())
    assert np.diff(coin) == pytest.approx(np.diff(coin)[0])


def test_an_interval_over_questions_is_wider_where_their_rows_repeat_each_other() -> None:
    once = judged(SCORES, rows_per_question=1)
    rows = np.repeat(np.arange(len(SCORES)), 4)
    repeated = once.take(rows)
    by_row = Judged(
        np.arange(len(rows)), repeated.draft_scores, repeated.target_scores, repeated.scores
    )
    honest = bootstrap(repeated, budget_area, 0, 300)
    naive = bootstrap(by_row, budget_area, 0, 300)
    assert honest.high - honest.low > 1.5 * (naive.high - naive.low)
    assert honest.low <= honest.value <= honest.high


def test_a_router_is_told_apart_from_a_coin_and_not_from_itself() -> None:
    rows = judged(SCORES)
    same = paired_bootstrap(rows, rows, budget_area, 0, 200)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    shuffled = rows.by(np.random.default_rng(1).permutation(SCORES))
    assert paired_bootstrap(rows, shuffled, budget_area, 0, 200).low > 0
    assert paired_bootstrap(shuffled, rows, budget_area, 0, 200).high < 0


def test_prior_correction_undoes_balancing() -> None:
    rng = np.random.default_rng(5)
    natural = rng.uniform(0, 1, 20_000)
    labels = rng.uniform(0, 1, 20_000) < natural * 0.3
    truth = natural * 0.3
    # Balanced training sees odds that are larger by the ratio of the classes.
    positive = labels.mean()
    balanced = shifted(truth, float(np.log((1 - positive) / positive)))
    shift = float(np.log(positive / (1 - positive)))
    assert calibration_error(balanced, labels) > 0.1
    assert calibration_error(shifted(balanced, shift), labels) < 0.02
