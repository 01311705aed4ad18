"""Runs every policy on the held-out problems and gathers the figures that the README quotes."""

import math
from collections.abc import Sequence
from typing import Any, Final

from model_packs.tiny.domain import Kind, Problem
from model_packs.tiny.evaluation import (
    AdvantageRule,
    RememberingWriter,
    RewardRule,
    RouterRule,
    accuracy,
    area_under_curve,
    bootstrap,
    by_problem,
    label_accuracy,
    router_correlation,
    target_share,
    wasted_share,
)
from model_packs.tiny.generation import StepWriter
from model_packs.tiny.pairs import CommitRule, OracleRule, Pair, RandomRule, Walked, walk
from model_packs.tiny.reward_model import StepScorer
from model_packs.tiny.router_model import DEAD_BAND, AdvantageEstimator, label_pairs

_RANDOM_SEED: Final = 41


def describe(walked: Sequence[Walked]) -> dict[str, Any]:
    """Returns one policy's figures."""
    return {
        "n": len(walked),
        "accuracy": bootstrap(walked, accuracy).to_json(),
        "target_share": bootstrap(walked, target_share).to_json(),
        "wasted_escalations": round(wasted_share(walked), 4),
        "accuracy_by_kind": {
            kind.value: round(accuracy(part), 4)
            for kind in Kind
            if (part := [w for w in walked if w.problem.kind is kind])
        },
    }


def _kept_gap(rows: Sequence[tuple[Walked, Walked, Walked]]) -> float:
    draft, target, routed = (accuracy([row[i] for row in rows]) for i in range(3))
    return (routed - draft) / (target - draft) if target != draft else math.nan


def describe_reward_model(pairs: Sequence[Pair], scorer: StepScorer) -> dict[str, Any]:
    """Returns how well the reward model tells right from wrong steps, where the prefix is right."""
    clean = [p for p in pairs if p.prefix_right]
    result: dict[str, Any] = {}
    for writer in ("draft", "target"):
        steps = [p.draft_step if writer == "draft" else p.target_step for p in clean]
        asked = [(p.problem, (*p.steps, step)) for p, step in zip(clean, steps, strict=True)]
        scores = [row[-1] for row in scorer.score(asked)]
        labels = [p.draft_right if writer == "draft" else p.target_right for p in clean]
        groups: dict[str, list[tuple[float, bool]]] = {}
        for p, score, label in zip(clean, scores, labels, strict=True):
            groups.setdefault(p.problem_id, []).append((score, label))
        result[f"{writer}_steps"] = {
            "n": len(clean),
            "right_share": round(sum(labels) / len(labels), 4),
            "area_under_curve": bootstrap(list(groups.values()), _group_area).to_json(),
        }
    return result


def _group_area(groups: Sequence[Sequence[tuple[float, bool]]]) -> float:
    flat = [item for group in groups for item in group]
    return area_under_curve([score for score, _ in flat], [label for _, label in flat])


def describe_router(
    pairs: Sequence[Pair], scorer: StepScorer, estimator: AdvantageEstimator, threshold: float
) -> dict[str, Any]:
    """Returns the router's quality against the reward model's advantage on one policy's steps."""
    rows = label_pairs(pairs, scorer)
    groups = by_problem(rows, estimator.estimate(pairs))
    return {
        "n": len(rows),
        "positive_share": round(sum(row.label for row in rows) / len(rows), 4),
        "dead_band": DEAD_BAND,
        "spearman": bootstrap(groups, router_correlation).to_json(),
        "label_0_accuracy": bootstrap(groups, lambda g: label_accuracy(g, 0, threshold)).to_json(),
        "label_1_accuracy": bootstrap(groups, lambda g: label_accuracy(g, 1, threshold)).to_json(),
    }


def evaluate(
    problems: Sequence[Problem],
    draft: StepWriter,
    target: StepWriter,
    scorer: StepScorer,
    estimator: AdvantageEstimator,
    threshold: float,
) -> dict[str, Any]:
    """Returns all held-out figures: policies, reward model and router."""
    drafts, targets = RememberingWriter(draft), RememberingWriter(target)

    def run(rule: CommitRule) -> list[Walked]:
        return walk(problems, drafts, targets, rule)

    draft_only, target_only = run(RandomRule(0.0, 0)), run(RandomRule(1.0, 0))
    routed = run(RouterRule(estimator, threshold))
    oracle = run(OracleRule())
    policies = {
        "draft_only": draft_only,
        "target_only": target_only,
        "arbitrage": routed,
        "random": run(RandomRule(target_share(routed), _RANDOM_SEED)),
        **{f"rsd at {score}": run(RewardRule(scorer, score)) for score in (0.3, 0.5, 0.7, 0.9)},
        "oracle (reward model)": run(AdvantageRule(scorer, DEAD_BAND)),
        "oracle (exact checker)": oracle,
    }
    gap = bootstrap(
        list(zip(draft_only, target_only, strict=True)),
        lambda rows: accuracy([r[1] for r in rows]) - accuracy([r[0] for r in rows]),
    )
    kept = bootstrap(list(zip(draft_only, target_only, routed, strict=True)), _kept_gap)
    own_pairs = [pair for w in routed for pair in w.pairs]
    oracle_pairs = [pair for w in oracle for pair in w.pairs]
    return {
        "threshold": threshold,
        "policies": {name: describe(walked) for name, walked in policies.items()},
        "gap": gap.to_json(),
        "kept_gap": kept.to_json(),
        "reward_model": describe_reward_model(oracle_pairs, scorer),
        "router": describe_router(own_pairs, scorer, estimator, threshold),
        "router_on_oracle_prefixes": describe_router(oracle_pairs, scorer, estimator, threshold),
    }
