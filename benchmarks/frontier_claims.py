"""What the frontier shows: areas, waste at equal rates, latency at matched accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.frontier_curves import (
    Ends,
    Outcomes,
    Points,
    accuracy_at,
    area,
    at_rate,
    latency_at,
    resampled,
    speedups,
)
from benchmarks.results import Bar, Claim, Floats

RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
_HOW = "every question asked once of the running services; paired bootstrap over problems"


@dataclass(frozen=True, slots=True)
class Frontier:
    """The outcomes of all policies on the same problems."""

    draft: Outcomes
    target: Outcomes
    curves: Mapping[str, Outcomes]
    seed: int
    rounds: int

    @property
    def problem_count(self) -> int:
        """Problems that every arm solved."""
        return int(self.draft.solved.shape[1])

    @property
    def whole(self) -> Floats:
        """Every problem once."""
        return np.ones(self.problem_count)

    def ends(self, weights: Floats) -> Ends:
        """Returns both ends' accuracies on weighted problems."""
        draft, target = self.draft.drawn(weights), self.target.drawn(weights)
        return Ends(float(draft.accuracy[0]), float(target.accuracy[0]))

    def estimate(self, statistic: Callable[[Floats], float]) -> tuple[float, tuple[float, float]]:
        """Returns a statistic of weighted problems, with its interval."""
        interval = resampled(self.problem_count, statistic, self.seed, self.rounds)
        return statistic(self.whole), interval

    def area_above(self, name: str, other: str) -> Callable[[Floats], float]:
        """Returns the statistic: area of one policy minus that of another."""

        def difference(weights: Floats) -> float:
            ends = self.ends(weights)
            mine, theirs = (self.curves[n].drawn(weights) for n in (name, other))
            return area(mine, ends) - area(theirs, ends)

        return difference

    def speedup(self, choose: Callable[[Floats], float]) -> Callable[[Floats], float]:
        """Returns the statistic: RSD's latency over arbitrage's, `choose`n over the curve."""

        def ratio(weights: Floats) -> float:
            rsd, routed = (self.curves[n].drawn(weights) for n in ("rsd", "arbitrage"))
            found = speedups(rsd, routed)
            return choose(found) if len(found) else float("nan")

        return ratio

    def matched_settings(self) -> dict[str, float]:
        """Returns the arms of both policies whose accuracies lie nearest the curve's middle."""
        ends = self.ends(self.whole)
        middle = (ends.draft_only + ends.target_only) / 2 + (ends.target_only - ends.draft_only) / 4
        found = {}
        for name in ("arbitrage", "rsd"):
            points = self.curves[name].drawn(self.whole)
            nearest = int(np.argmin(np.abs(points.accuracy - middle)))
            found[name] = self.curves[name].settings[nearest]
        return found

    def live_rows(
        self, latencies: Mapping[str, Sequence[float]], problem_count: int
    ) -> tuple[dict[str, object], ...]:
        """Returns how live latencies compare to the replayed ones of the same problems."""
        row: dict[str, object] = {"name": "live", "n": problem_count}
        means = {}
        for name, seconds in latencies.items():
            setting = self.matched_settings()[name]
            arm = self.curves[name].settings.index(setting)
            replayed = self.curves[name].latency_s[arm, :problem_count].mean()
            means[name] = float(np.mean(seconds)), float(replayed)
            row[f"{name}_setting"] = setting
            row[f"{name}_live_over_replayed"] = round(means[name][0] / means[name][1], 4)
        row["rsd_over_arbitrage_live"] = round(means["rsd"][0] / means["arbitrage"][0], 4)
        row["rsd_over_arbitrage_replayed"] = round(means["rsd"][1] / means["arbitrage"][1], 4)
        return (row,)

    def arms(self) -> tuple[dict[str, object], ...]:
        """Returns a row for every arm."""
        every = {"draft_only": self.draft, "target_only": self.target, **self.curves}
        return tuple(
            self._arm(name, outcomes, index)
            for name, outcomes in every.items()
            for index in range(len(outcomes.settings))
        )

    def _arm(self, name: str, outcomes: Outcomes, index: int) -> dict[str, object]:
        solved, latency_s = outcomes.solved[index], outcomes.latency_s[index]
        low, high = resampled(
            self.problem_count, lambda w: float(solved @ w / w.sum()), self.seed, 200
        )
        points = outcomes.drawn(self.whole)
        return {
            "policy": name,
            "setting": float(f"{outcomes.settings[index]:.6g}"),
            "accuracy": round(float(solved.mean()), 4),
            "accuracy_interval": [round(low, 4), round(high, 4)],
            "escalation_rate": round(float(points.rate[index]), 4),
            "wasted_escalations": round(float(points.waste[index]), 4),
            "mean_latency_s": round(float(latency_s.mean()), 5),
            "p50_latency_s": round(float(np.percentile(latency_s, 50)), 5),
            "p95_latency_s": round(float(np.percentile(latency_s, 95)), 5),
        }


def claims(frontier: Frontier) -> tuple[Claim, ...]:
    """Returns whether advantage beats absolute quality, and by how much."""
    n = frontier.problem_count
    found = []
    for other in ("rsd", "random"):
        value, interval = frontier.estimate(frontier.area_above("arbitrage", other))
        found.append(
            Claim(
                f"area under accuracy against acceptance, arbitrage minus {other}, lower end",
                value,
                "",
                _HOW,
                n,
                Bar("above", 0.0),
                interval,
                judged=interval[0],
            )
        )
    value, interval = frontier.estimate(frontier.speedup(lambda r: float(np.median(r))))
    found.append(
        Claim(
            "latency of rsd over that of arbitrage at matched accuracy, median over the curve",
            value,
            "×",
            "serial latency of the calls each makes; bootstrap over problems",
            n,
            Bar("above", 1.0),
            interval,
        )
    )
    value, interval = frontier.estimate(frontier.speedup(lambda r: float(np.max(r))))
    found.append(
        Claim(
            "the same, maximum over the curve (published: 1.62 × and 1.97 ×)",
            value,
            "×",
            "published on MATH500 and OlympiadBench with 7B over 1.5B models on GPUs: to compare "
            "with, not to reach on other models",
            n,
            Bar("above", 1.0),
            interval,
        )
    )
    return tuple(found)


def rows(frontier: Frontier) -> tuple[dict[str, object], ...]:
    """Returns areas, waste at equal rates, and the break-even of the cost law."""
    ends = frontier.ends(frontier.whole)
    areas: dict[str, object] = {"name": "area"}
    for name, outcomes in frontier.curves.items():
        areas[name] = round(area(outcomes.drawn(frontier.whole), ends), 4)
    found: list[dict[str, object]] = [areas]
    found += [
        _waste_row(frontier, name, rate)
        for name in ("rsd", "arbitrage", "oracle", "random")
        for rate in RATES
    ]
    grid = np.linspace(ends.draft_only, ends.target_only, 9)[1:]
    latencies = {
        name: latency_at(frontier.curves[name].drawn(frontier.whole), grid)
        for name in ("rsd", "arbitrage")
    }
    for index, accuracy in enumerate(grid):
        pair = {name: float(values[index]) for name, values in latencies.items()}
        if all(np.isfinite(list(pair.values()))):
            found.append(
                {
                    "name": "latency at accuracy",
                    "accuracy": round(float(accuracy), 4),
                    **{f"{name}_s": round(value, 5) for name, value in pair.items()},
                    "ratio": round(pair["rsd"] / pair["arbitrage"], 4),
                }
            )
    return tuple(found)


def _waste_row(frontier: Frontier, name: str, rate: float) -> dict[str, object]:
    outcomes = frontier.curves[name]

    def waste(pick: Callable[[Points], Floats]) -> Callable[[Floats], float]:
        def statistic(weights: Floats) -> float:
            points = outcomes.drawn(weights)
            return at_rate(points, pick(points), rate)

        return statistic

    value, (low, high) = frontier.estimate(waste(lambda p: p.waste))
    of_steps = waste(lambda p: p.wasted_of_steps)(frontier.whole)
    accuracy = accuracy_at(
        outcomes.drawn(frontier.whole), frontier.ends(frontier.whole), np.array([rate])
    )
    return {
        "name": "waste",
        "policy": name,
        "escalation_rate": rate,
        "wasted_escalations": _rounded(value),
        "interval": [_rounded(low), _rounded(high)],
        "wasted_of_all_steps": _rounded(of_steps),
        "accuracy": round(float(accuracy[0]), 4),
    }


def _rounded(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None
