"""What a run over problems comes to: accuracy, latency and the target's share, by policy."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest

from benchmarks.attempt_log import Attempt
from benchmarks.results import Bar, Claim, bootstrap

_LEAST_N = 20
Arm = dict[str, object]


def arms(labels: Sequence[str], attempts: Sequence[Attempt]) -> tuple[Arm, ...]:
    """Returns the figures of each policy, in the order of `labels`."""
    return tuple(_arm(label, [a for a in attempts if a.arm == label]) for label in labels)


def _arm(label: str, attempts: Sequence[Attempt]) -> Arm:
    right = sum(attempt.is_right for attempt in attempts)
    # Wilson's interval, for few problems and shares near 0 or 1.
    interval = binomtest(right, len(attempts)).proportion_ci(method="wilson")
    seconds = np.array([attempt.seconds for attempt in attempts])
    return {
        "policy": label,
        "n": len(attempts),
        "accuracy": round(right / len(attempts), 4),
        "accuracy_interval": [round(float(interval.low), 4), round(float(interval.high), 4)],
        "latency_s": {
            "mean": round(float(seconds.mean()), 2),
            "p50": round(float(np.percentile(seconds, 50)), 2),
            "p95": round(float(np.percentile(seconds, 95)), 2),
        },
        "target_step_share": _share(attempts, "target_steps", "steps"),
        "target_token_share": _share(attempts, "target_tokens", "tokens"),
        "steps": round(sum(attempt.steps for attempt in attempts) / len(attempts), 2),
        "tokens": round(sum(attempt.tokens for attempt in attempts) / len(attempts), 1),
        "stop_reasons": dict(Counter(attempt.stop_reason for attempt in attempts)),
    }


def _share(attempts: Sequence[Attempt], part: str, whole: str) -> float:
    total: int = sum(getattr(attempt, whole) for attempt in attempts)
    by_target: int = sum(getattr(attempt, part) for attempt in attempts)
    return round(by_target / max(1, total), 4)


def claims(
    labels: Sequence[str], attempts: Sequence[Attempt], question_count: int
) -> tuple[Claim, ...]:
    """Returns how many questions were asked, and by how much the target is the better model."""
    found = [
        Claim(
            "questions asked under every policy",
            question_count,
            "questions",
            f"a seeded sample, {len(labels)} policies",
            question_count,
            Bar("at least", _LEAST_N),
        )
    ]
    if {"draft_only", "target_only"} <= set(labels):
        right = {(a.question_id, a.arm): a.is_right for a in attempts}
        ids = sorted({attempt.question_id for attempt in attempts})
        gaps = np.array(
            [float(right[i, "target_only"]) - float(right[i, "draft_only"]) for i in ids]
        )
        interval = bootstrap(len(gaps), lambda at: 100 * float(gaps[at].mean()), seed=0)
        found.append(
            Claim(
                "accuracy of target_only above draft_only, lower end",
                100 * float(gaps.mean()),
                "points",
                "paired by question",
                len(gaps),
                Bar("above", 0),
                interval,
                judged=interval[0],
            )
        )
    return tuple(found)


def rows(options: argparse.Namespace) -> tuple[dict[str, object], ...]:
    """Returns what was asked of whom."""
    settings = [f"{s.name}.{s.variable}={s.value}" for s in options.set]
    return (
        {"pack": options.pack, "n": options.n, "max_tokens": options.max_tokens},
        {"settings": settings},
    )
