"""Measures the pack offline: accuracy of every policy, the reward model's and the router's quality.

Every figure comes with a 95 % interval by bootstrap over problems, never over rows.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from model_packs.tiny.generation import StepWriter, WrittenStep
from model_packs.tiny.pairs import DRAFT, TARGET, Pair, Walked
from model_packs.tiny.reward_model import StepScorer
from model_packs.tiny.router_model import AdvantageEstimator, LabelledPair

_RESAMPLES: Final = 1000
Item = TypeVar("Item")


class RememberingWriter:
    """Writes like the writer it wraps, but each prefix once, so comparing policies is cheap."""

    def __init__(self, writer: StepWriter) -> None:
        self._writer = writer
        self._seen: dict[tuple[str, tuple[str, ...]], WrittenStep] = {}

    def write(self, prefixes: Sequence[tuple[str, Sequence[str]]]) -> list[WrittenStep]:
        """Returns the next step of each (problem, steps), in order."""
        keys = [(problem, tuple(steps)) for problem, steps in prefixes]
        todo = list(dict.fromkeys(key for key in keys if key not in self._seen))
        if todo:
            self._seen |= zip(todo, self._writer.write(todo), strict=True)
        return [self._seen[key] for key in keys]


@dataclass(frozen=True, slots=True)
class RouterRule:
    """Commits the target's step where the router's score is above the threshold; ties accept."""

    estimator: AdvantageEstimator
    threshold: float
    name: str = "arbitrage"

    def escalate(self, pairs: Sequence[Pair]) -> list[bool]:
        """Asks the router."""
        return [score > self.threshold for score in self.estimator.estimate(pairs)]


@dataclass(frozen=True, slots=True)
class RewardRule:
    """Commits the target's step where the draft's own reward is below `acceptance_score` (RSD)."""

    scorer: StepScorer
    acceptance_score: float
    name: str = "rsd"

    def escalate(self, pairs: Sequence[Pair]) -> list[bool]:
        """Asks the reward model about the draft's step."""
        scores = self.scorer.score([(p.problem, (*p.steps, p.draft_step)) for p in pairs])
        return [row[-1] < self.acceptance_score for row in scores]


@dataclass(frozen=True, slots=True)
class AdvantageRule:
    """Commits the target's step where its reward beats the draft's: an upper bound."""

    scorer: StepScorer
    advantage_threshold: float
    name: str = "oracle"

    def escalate(self, pairs: Sequence[Pair]) -> list[bool]:
        """Asks the reward model about both steps."""
        draft = self.scorer.score([(p.problem, (*p.steps, p.draft_step)) for p in pairs])
        target = self.scorer.score([(p.problem, (*p.steps, p.target_step)) for p in pairs])
        return [
            t[-1] - d[-1] > self.advantage_threshold for d, t in zip(draft, target, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Interval:
    """Holds an estimate with its 95 % interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """Returns the three numbers, rounded for reading."""
        return {
            "value": round(self.value, 4),
            "low": round(self.low, 4),
            "high": round(self.high, 4),
        }


def bootstrap(
    items: Sequence[Item], measure: Callable[[Sequence[Item]], float], seed: int = 0
) -> Interval:
    """Returns `measure` of the items with its percentile interval over resamples of the items."""
    rng = random.Random(seed)
    values = sorted(measure(rng.choices(items, k=len(items))) for _ in range(_RESAMPLES))
    return Interval(
        measure(items), values[int(0.025 * _RESAMPLES)], values[int(0.975 * _RESAMPLES) - 1]
    )


def accuracy(walked: Sequence[Walked]) -> float:
    """Returns the share of problems solved."""
    return sum(w.solved for w in walked) / len(walked)


def target_share(walked: Sequence[Walked]) -> float:
    """Returns the share of all steps that the target wrote."""
    step_count = sum(len(w.writers) for w in walked)
    return sum(writer == TARGET for w in walked for writer in w.writers) / step_count


def wasted_share(walked: Sequence[Walked]) -> float:
    """Returns the share of escalations that the exact checker finds no better."""
    wasted = escalated = 0
    for w in walked:
        for pair, writer in zip(w.pairs, w.writers, strict=True):
            if writer != DRAFT:
                escalated += 1
                wasted += not (pair.target_right and not pair.draft_right)
    return wasted / escalated if escalated else 0.0


def ranks(values: Sequence[float]) -> list[float]:
    """Returns fractional ranks, ties sharing their mean rank.

    >>> ranks([3.0, 1.0, 3.0])
    [1.5, 0.0, 1.5]
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    result = [0.0] * len(values)
    at = 0
    while at < len(order):
        end = at
        while end < len(order) and values[order[end]] == values[order[at]]:
            end += 1
        for index in order[at:end]:
            result[index] = (at + end - 1) / 2
        at = end
    return result


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Returns the rank correlation of two equally long sequences.

    >>> round(spearman([1.0, 2.0, 3.0], [10.0, 20.0, 15.0]), 3)
    0.5
    """
    a, b = ranks(left), ranks(right)
    mean = (len(a) - 1) / 2
    covariance = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    spread = sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b)
    return float(covariance / spread**0.5) if spread else 0.0


def area_under_curve(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Returns the chance that a random positive scores above a random negative.

    >>> area_under_curve([0.1, 0.4, 0.35, 0.8], [False, False, True, True])
    0.75
    """
    positives = sum(labels)
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    rank_sum = sum(rank for rank, label in zip(ranks(scores), labels, strict=True) if label)
    return (rank_sum - positives * (positives - 1) / 2) / (positives * negatives)


def by_problem(
    rows: Sequence[LabelledPair], scores: Sequence[float]
) -> list[list[tuple[LabelledPair, float]]]:
    """Groups labelled rows and the router's scores by problem, for resampling."""
    groups: dict[str, list[tuple[LabelledPair, float]]] = {}
    for row, score in zip(rows, scores, strict=True):
        groups.setdefault(row.pair.problem_id, []).append((row, score))
    return list(groups.values())


def router_correlation(groups: Sequence[Sequence[tuple[LabelledPair, float]]]) -> float:
    """Returns Spearman's rho between the router's score and the advantage."""
    flat = [item for group in groups for item in group]
    return spearman([score for _, score in flat], [row.advantage for row, _ in flat])


def label_accuracy(
    groups: Sequence[Sequence[tuple[LabelledPair, float]]], label: int, threshold: float
) -> float:
    """Returns the share of this label's rows that the router decides rightly."""
    right = [
        (score > threshold) == bool(label) for g in groups for row, score in g if row.label == label
    ]
    return sum(right) / len(right) if right else float("nan")
