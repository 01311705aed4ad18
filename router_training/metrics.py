"""How good a router is, from its scores and the measured rewards: pure functions over arrays.

Intervals are 95 % percentile ones by bootstrap over questions: rows of one question are not
independent, so they are drawn together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Floats: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.intp]
RATES: Final = np.linspace(0.0, 1.0, 41)
_BINS: Final = 10


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """Returns the numbers, rounded for reading; null where there is none."""
        return {name: _rounded(getattr(self, name)) for name in ("value", "low", "high")}


@dataclass(frozen=True, slots=True)
class Judged:
    """Rows as arrays [rows]: the question of each, both rewards, and some score to route by."""

    questions: NDArray[np.intp]
    draft_scores: Floats
    target_scores: Floats
    scores: Floats
    margin: float = 0.0

    @property
    def advantages(self) -> Floats:
        """Δ of each row."""
        return self.target_scores - self.draft_scores

    @property
    def labels(self) -> NDArray[np.bool_]:
        """Whether each row's advantage is above the margin."""
        return self.advantages > self.margin

    def take(self, rows: Indices) -> Judged:
        """Returns some of the rows, repeats allowed."""
        return Judged(
            self.questions[rows],
            self.draft_scores[rows],
            self.target_scores[rows],
            self.scores[rows],
            self.margin,
        )

    def by(self, scores: Floats) -> Judged:
        """Returns the same rows with other scores to route by."""
        return Judged(self.questions, self.draft_scores, self.target_scores, scores, self.margin)


def bootstrap(
    judged: Judged, statistic: Callable[[Judged], float], seed: int, rounds: int = 1000
) -> Estimate:
    """Returns `statistic` with its interval over resampled questions."""
    groups = _rows_by_question(judged.questions)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(rounds):
        drawn = rng.integers(0, len(groups), len(groups))
        values.append(statistic(judged.take(np.concatenate([groups[i] for i in drawn]))))
    finite = np.asarray([value for value in values if np.isfinite(value)])
    low, high = np.percentile(finite, [2.5, 97.5]) if len(finite) else (np.nan, np.nan)
    return Estimate(statistic(judged), float(low), float(high))


def paired_bootstrap(
    left: Judged, right: Judged, statistic: Callable[[Judged], float], seed: int, rounds: int = 1000
) -> Estimate:
    """Returns `statistic` of `left` minus that of `right`, both over the same resamples.

    The two are the same rows under different scores.
    """
    groups = _rows_by_question(left.questions)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(rounds):
        rows = np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))])
        values.append(statistic(left.take(rows)) - statistic(right.take(rows)))
    low, high = np.percentile(values, [2.5, 97.5])
    return Estimate(statistic(left) - statistic(right), float(low), float(high))


def spearman(left: Floats, right: Floats) -> float:
    """Returns Spearman's rank correlation, ties given their mean rank; nan where one is constant.

    >>> round(spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 15.0])), 3)
    0.5
    """
    if len(left) < 2 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(left), rankdata(right))[0, 1])


def area_under_roc(scores: Floats, labels: NDArray[np.bool_]) -> float:
    """Returns the chance that a random positive scores above a random negative.

    >>> area_under_roc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
    0.75
    """
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    rank_sum = float(rankdata(scores)[labels].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def label_accuracy(judged: Judged, label: bool, threshold: float) -> float:
    """Returns the share of this label's rows that `score > threshold` decides rightly."""
    chosen = judged.scores[judged.labels == label]
    return float(np.mean((chosen > threshold) == label)) if len(chosen) else float("nan")


def balanced_accuracy(judged: Judged, threshold: float) -> float:
    """Returns the mean of both labels' accuracies."""
    return (label_accuracy(judged, False, threshold) + label_accuracy(judged, True, threshold)) / 2


def shifted(scores: Floats, logit_shift: float) -> Floats:
    """Returns sigmoid(logit(score) + shift): scores read as probabilities under another prior.

    >>> shifted(np.array([0.5]), 0.0)
    array([0.5])
    """
    clipped = np.clip(scores, 1e-9, 1 - 1e-9)
    result: Floats = 1 / (1 + np.exp(-(np.log(clipped / (1 - clipped)) + logit_shift)))
    return result


def calibration_error(probabilities: Floats, labels: NDArray[np.bool_]) -> float:
    """Returns the expected calibration error over ten bins of equal width.

    >>> round(calibration_error(np.array([0.95, 0.95]), np.array([True, False])), 3)
    0.45
    """
    bins = np.minimum((probabilities * _BINS).astype(int), _BINS - 1)
    gaps = [
        (bins == b).mean() * abs(probabilities[bins == b].mean() - labels[bins == b].mean())
        for b in np.unique(bins)
    ]
    return float(sum(gaps))


def budget_curve(judged: Judged, rates: Floats = RATES) -> Floats:
    """Returns the mean reward when the best-scored share `rate` of rows is escalated, per rate.

    Rows of equal score share the escalations that fall among them, so their order says nothing.

    >>> rows = Judged(np.arange(2), np.array([0.2, 0.8]), np.ones(2), np.array([0.9, 0.1]))
    >>> budget_curve(rows, np.array([0.0, 0.5, 1.0]))
    array([0.5, 0.9, 1. ])
    """
    _, tie = np.unique(-judged.scores, return_inverse=True)
    counts = np.bincount(tie)
    gains = np.bincount(tie, weights=judged.advantages)
    at = np.concatenate([[0.0], np.cumsum(counts)]) / len(tie)
    reward = judged.draft_scores.mean() + np.concatenate([[0.0], np.cumsum(gains)]) / len(tie)
    return np.asarray(np.interp(rates, at, reward))


def budget_area(judged: Judged) -> float:
    """Returns the area under the budget curve over rates 0 to 1, in units of reward."""
    return float(np.trapezoid(budget_curve(judged), RATES))


def _rows_by_question(questions: NDArray[np.intp]) -> list[Indices]:
    order = np.argsort(questions, kind="stable")
    starts = np.flatnonzero(np.diff(questions[order])) + 1
    return list(np.split(order, starts))


def question_numbers(question_ids: Sequence[str]) -> NDArray[np.intp]:
    """Returns a number for each id, equal ids equal numbers."""
    return np.unique(np.asarray(question_ids), return_inverse=True)[1]


def _rounded(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None
