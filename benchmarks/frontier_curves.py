"""Curves over a sweep of thresholds, and what is compared between them: pure functions.

An arm is one policy at one threshold on all problems; a curve is the arms of one policy. The
bootstrap draws problems and takes all arms' outcomes on them, so comparisons are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.results import Floats

GRID = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What a policy's arms made of the problems: arrays [arms, problems].

    `escalated` of `routed` steps were given to the target, `wasted` of them for nothing (the
    target's reward was no higher); `latency_s` is serial.
    """

    settings: tuple[float, ...]
    solved: Floats
    steps: Floats
    routed: Floats
    escalated: Floats
    wasted: Floats
    latency_s: Floats

    def drawn(self, weights: Floats) -> Points:
        """Returns the arms as points, problem i counted `weights[i]` times."""
        escalated = self.escalated @ weights
        return Points(
            rate=escalated / np.maximum(1, self.routed @ weights),
            accuracy=self.solved @ weights / weights.sum(),
            waste=(self.wasted @ weights) / np.maximum(1, escalated),
            wasted_of_steps=(self.wasted @ weights) / np.maximum(1, self.steps @ weights),
            latency_s=self.latency_s @ weights / weights.sum(),
        )


@dataclass(frozen=True, slots=True)
class Points:
    """The arms of a policy as points [arms]: shares, and seconds a problem."""

    rate: Floats
    accuracy: Floats
    waste: Floats
    wasted_of_steps: Floats
    latency_s: Floats


@dataclass(frozen=True, slots=True)
class Ends:
    """What every curve runs between: the accuracies at escalation rates 0 and 1."""

    draft_only: float
    target_only: float


def accuracy_at(points: Points, ends: Ends, rates: Floats) -> Floats:
    """Returns the accuracy at escalation rates, linear between arms and the two ends.

    >>> points = Points(*(np.array([v]) for v in (0.5, 0.9, 0.0, 0.0, 1.0)))
    >>> accuracy_at(points, Ends(0.5, 1.0), np.array([0.0, 0.25, 0.5, 1.0]))
    array([0.5, 0.7, 0.9, 1. ])
    """
    order = np.argsort(points.rate, kind="stable")
    x = np.concatenate([[0.0], points.rate[order], [1.0]])
    y = np.concatenate([[ends.draft_only], points.accuracy[order], [ends.target_only]])
    # Several arms at one rate count as their mean.
    rates_seen, where = np.unique(x, return_inverse=True)
    means = np.bincount(where, weights=y) / np.bincount(where)
    return np.asarray(np.interp(rates, rates_seen, means))


def area(points: Points, ends: Ends) -> float:
    """Returns the area under accuracy against acceptance over [0, 1].

    Acceptance is 1 minus the escalation rate, so the area is the same over either.
    """
    return float(np.trapezoid(accuracy_at(points, ends, GRID), GRID))


def at_rate(points: Points, values: Floats, rate: float) -> float:
    """Returns some value of the arms at an escalation rate; nan beyond the arms."""
    order = np.argsort(points.rate, kind="stable")
    return float(np.interp(rate, points.rate[order], values[order], left=np.nan, right=np.nan))


def latency_at(points: Points, accuracies: Floats) -> Floats:
    """Returns the least latency with which the arms reach each accuracy; nan where none does.

    >>> arms = np.array([0.6, 0.8]), np.array([1.0, 2.0])
    >>> points = Points(np.array([0.1, 0.2]), arms[0], arms[0], arms[0], arms[1])
    >>> latency_at(points, np.array([0.7, 0.9]))
    array([1.5, nan])
    """
    order = np.argsort(points.latency_s, kind="stable")
    reached = np.maximum.accumulate(points.accuracy[order])
    steps = np.concatenate([[True], np.diff(reached) > 0])
    return np.asarray(
        np.interp(
            accuracies, reached[steps], points.latency_s[order][steps], left=np.nan, right=np.nan
        )
    )


def speedups(slow: Points, quick: Points, count: int = 33) -> Floats:
    """Returns the latency of one policy over another's at accuracies that both reach."""
    top = min(slow.accuracy.max(), quick.accuracy.max())
    bottom = max(slow.accuracy.min(), quick.accuracy.min())
    ratios = latency_at(slow, grid := np.linspace(bottom, top, count)) / latency_at(quick, grid)
    return np.asarray(ratios[np.isfinite(ratios)])


def resampled(
    problem_count: int, statistic: Callable[[Floats], float], seed: int, rounds: int
) -> tuple[float, float]:
    """Returns the 95 % interval of `statistic`, which gets how often each problem was drawn."""
    rng = np.random.default_rng(seed)
    share = np.full(problem_count, 1 / problem_count)
    values = [statistic(rng.multinomial(problem_count, share).astype(float)) for _ in range(rounds)]
    finite = [value for value in values if np.isfinite(value)]
    low, high = np.percentile(finite, [2.5, 97.5]) if finite else (np.nan, np.nan)
    return float(low), float(high)


def band(
    outcomes: Outcomes, ends: Callable[[Floats], Ends], seed: int, rounds: int
) -> tuple[Floats, Floats]:
    """Returns the 95 % band of a policy's accuracy over the grid of escalation rates."""
    rng = np.random.default_rng(seed)
    n = outcomes.solved.shape[1]
    curves = []
    for _ in range(rounds):
        weights = rng.multinomial(n, np.full(n, 1 / n)).astype(float)
        curves.append(accuracy_at(outcomes.drawn(weights), ends(weights), GRID))
    low, high = np.percentile(curves, [2.5, 97.5], axis=0)
    return low, high


def plot(
    path: str,
    curves: Mapping[str, Outcomes],
    bands: Mapping[str, tuple[Floats, Floats]],
    ends: tuple[Outcomes, Outcomes],
    caption: str,
) -> None:
    """Draws accuracy against escalation rate, and latency against accuracy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    whole = np.ones(ends[0].solved.shape[1])
    draft, target = (end.drawn(whole) for end in ends)
    both = Ends(float(draft.accuracy[0]), float(target.accuracy[0]))
    for number, (name, outcomes) in enumerate(curves.items()):
        points, color = outcomes.drawn(whole), f"C{number}"
        left.plot(GRID, 100 * accuracy_at(points, both, GRID), color=color, label=name)
        left.plot(points.rate, 100 * points.accuracy, ".", color=color, markersize=4)
        if name in bands:
            low, high = bands[name]
            left.fill_between(GRID, 100 * low, 100 * high, color=color, alpha=0.15)
        order = np.argsort(points.latency_s)
        right.plot(
            *(100 * points.accuracy[order], 1e3 * points.latency_s[order], ".-"),
            color=color,
            label=name,
            markersize=4,
            linewidth=1,
        )
    for name, point, marker in (("draft_only", draft, "v"), ("target_only", target, "^")):
        rate = 0.0 if name == "draft_only" else 1.0
        left.plot(rate, 100 * point.accuracy[0], marker, color="black", label=name)
        right.plot(
            *(100 * point.accuracy[0], 1e3 * point.latency_s[0], marker), color="black", label=name
        )
    left.set(xlabel="escalation rate (share of routed steps)", ylabel="problems solved, %")
    right.set(xlabel="problems solved, %", ylabel="mean serial latency of a problem, ms")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(caption)
    figure.savefig(path, dpi=120)


def spread(scores: Sequence[float], count: int) -> tuple[float, ...]:
    """Returns thresholds that part the scores evenly, each once, rising.

    >>> spread([0.1, 0.2, 0.3, 0.4], 4)
    (0.1, 0.2, 0.3, 0.4)
    """
    return tuple(sorted({float(q) for q in np.quantile(scores, np.linspace(0, 1, count))}))
