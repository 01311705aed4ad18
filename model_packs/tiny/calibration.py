"""Chooses the router's threshold and tabulates what share of steps each threshold escalates."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from model_packs.tiny.domain import Problem
from model_packs.tiny.evaluation import (
    RememberingWriter,
    RouterRule,
    accuracy,
    target_share,
)
from model_packs.tiny.generation import StepWriter
from model_packs.tiny.pack import sha256_of
from model_packs.tiny.pairs import RandomRule, walk
from model_packs.tiny.router_model import DEAD_BAND, AdvantageEstimator

LARGEST_SHARE: Final = 0.5
KEPT_GAP: Final = 0.99  # of the gap on calibration problems, so that 95 % holds on others
_THRESHOLDS: Final = (
    *(0.0, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.095),
    *(0.1, 0.105, 0.11, 0.115, 0.12, 0.125, 0.13, 0.135, 0.14, 0.15, 0.175, 0.2, 0.25, 0.3),
    *(0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99),
    *(0.995, 1.0),
)


def calibrate(
    problems: Sequence[Problem],
    draft: StepWriter,
    target: StepWriter,
    estimator: AdvantageEstimator,
) -> dict[str, Any]:
    """Runs the loop at every threshold on calibration problems, on the router's own prefixes.

    The default is the highest threshold that keeps KEPT_GAP of the accuracy gap within
    LARGEST_SHARE; where none does, the one within LARGEST_SHARE that keeps the most, of several
    the highest.
    """
    drafts, targets = RememberingWriter(draft), RememberingWriter(target)
    alone = accuracy(walk(problems, drafts, targets, RandomRule(0.0, 0)))
    full = accuracy(walk(problems, drafts, targets, RandomRule(1.0, 0)))
    rows: list[dict[str, float]] = []
    for threshold in _THRESHOLDS:
        walked = walk(problems, drafts, targets, RouterRule(estimator, threshold))
        share = target_share(walked)
        if rows:  # more caution never means more steps in the table, whatever the sample says
            share = min(share, rows[-1]["target_share"])
        kept = (accuracy(walked) - alone) / max(full - alone, 1e-9)
        rows.append({"threshold": threshold, "target_share": share, "kept_gap": kept})
    within = [row for row in rows if row["target_share"] <= LARGEST_SHARE]
    enough = [row for row in within if row["kept_gap"] >= KEPT_GAP]
    keeps_most = max(row["kept_gap"] for row in within)
    best = max(
        enough or [row for row in within if row["kept_gap"] == keeps_most],
        key=lambda row: row["threshold"],
    )
    return {
        "default_threshold": best["threshold"],
        "draft_only_accuracy": alone,
        "target_only_accuracy": full,
        "problem_count": len(problems),
        "rows": rows,
    }


def router_metadata(work: Path) -> dict[str, object]:
    """Returns what `router.json` says, from what the stages left in the work folder."""
    calibration = json.loads((work / "calibration.json").read_text())
    rows = json.loads((work / "router-rows.json").read_text())
    chosen = next(
        row for row in calibration["rows"] if row["threshold"] == calibration["default_threshold"]
    )
    return {
        "format_version": 1,
        "annotation": True,
        "score_rule": {"kind": "softmax", "positive_class": 1},
        "num_labels": 2,
        "default_threshold": calibration["default_threshold"],
        "calibration": [
            {"threshold": row["threshold"], "target_share": round(row["target_share"], 4)}
            for row in calibration["rows"]
        ],
        "training_data_digest": rows["digest"],
        # At the default threshold, on calibration problems; held-out figures are a benchmark's.
        "metrics": {
            "problem_count": calibration["problem_count"],
            "kept_gap": round(chosen["kept_gap"], 4),
            "target_share": round(chosen["target_share"], 4),
        },
        "base": {"model": "prm", "revision": sha256_of(work / "prm" / "model.safetensors")},
        "prior_correction": {
            "positive_share_before_balancing": round(rows["positive_share"], 4),
            "dead_band": DEAD_BAND,
            "applied": False,
        },
    }
