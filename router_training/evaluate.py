"""Measures a trained router on test questions and makes the checkpoint folder that is promoted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arbitrage.core.calibration import CalibrationTable
from router_training.config import Evaluate
from router_training.metrics import (
    RATES,
    Floats,
    Judged,
    area_under_roc,
    balanced_accuracy,
    bootstrap,
    budget_area,
    budget_curve,
    calibration_error,
    label_accuracy,
    paired_bootstrap,
    shifted,
    spearman,
)
from router_training.rows import Row
from router_training.stages import write_atomically
from services.engines.router_format import FORMAT_VERSION, OrdinalRule, ScoreRule, SoftmaxRule


@dataclass(frozen=True, slots=True)
class Trained:
    """What is known of a router before it is measured; `logit_shift` undoes the balancing."""

    annotated: bool
    rule: ScoreRule
    class_count: int
    margin: float
    logit_shift: float
    data_digest: str
    base: str


def baselines(rows: Sequence[Row], test: Judged) -> dict[str, Floats]:
    """Returns scores that need no training: the higher, the sooner a step is escalated.

    `oracle` is no baseline but the bound. A step without an entropy is never escalated by it.
    """
    return {
        "rsd": -test.draft_scores,
        "first_token_entropy": np.array(
            [-1.0 if row.draft_entropy is None else row.draft_entropy for row in rows]
        ),
        "step_length": np.array([float(row.draft_token_count) for row in rows]),
        "random": np.zeros(len(rows)),
        "oracle": test.advantages,
    }


def measure(
    rows: Sequence[Row], test: Judged, logit_shift: float, threshold: float, settings: Evaluate
) -> dict[str, Any]:
    """Returns all figures of a router on test rows, each with its 95 % interval over questions."""
    statistics: dict[str, Callable[[Judged], float]] = {
        "spearman": lambda j: spearman(j.scores, j.advantages),
        "label_0_accuracy": lambda j: label_accuracy(j, False, threshold),
        "label_1_accuracy": lambda j: label_accuracy(j, True, threshold),
        "balanced_accuracy": lambda j: balanced_accuracy(j, threshold),
        "area_under_roc": lambda j: area_under_roc(j.scores, j.labels),
        "calibration_error_raw": lambda j: calibration_error(j.scores, j.labels),
        "calibration_error_prior_corrected": lambda j: calibration_error(
            shifted(j.scores, logit_shift), j.labels
        ),
        "budget_area": budget_area,
    }
    others = baselines(rows, test)
    return {
        "row_count": len(rows),
        "question_count": len(set(test.questions.tolist())),
        "positive_share": round(float(test.labels.mean()), 4),
        "threshold": threshold,
        "metrics": {
            name: bootstrap(test, statistic, settings.seed, settings.rounds).to_json()
            for name, statistic in statistics.items()
        },
        "budget_curve": {
            "rates": [round(float(rate), 4) for rate in RATES],
            "router": _curve(test),
            **{name: _curve(test.by(scores)) for name, scores in others.items()},
        },
        "budget_area_above": {
            name: paired_bootstrap(
                test, test.by(scores), budget_area, settings.seed, settings.rounds
            ).to_json()
            for name, scores in others.items()
        },
        "baseline_spearman": {
            name: _finite(spearman(scores, test.advantages))
            for name, scores in others.items()
            if name not in {"random", "oracle"}
        },
    }


def router_json(
    trained: Trained, table: CalibrationTable, threshold: float, metrics: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns what `router.json` says."""
    return {
        "format_version": FORMAT_VERSION,
        "annotation": trained.annotated,
        "score_rule": _rule_json(trained.rule),
        "num_labels": trained.class_count,
        "default_threshold": threshold,
        "calibration": [
            {"threshold": t, "target_share": s}
            for t, s in zip(table.thresholds, table.target_shares, strict=True)
        ],
        "training_data_digest": trained.data_digest,
        "metrics": dict(metrics),
        "base": trained.base,
        "prior_correction": {
            "logit_shift": round(trained.logit_shift, 6),
            "margin": trained.margin,
        },
    }


def write_checkpoint(model: Path, metadata: Mapping[str, Any], folder: Path) -> None:
    """Makes a router checkpoint of a trained model: weights, tokenizer, `router.json`."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(model, partial)
    write_atomically(partial / "router.json", json.dumps(metadata, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def _rule_json(rule: ScoreRule) -> dict[str, Any]:
    if isinstance(rule, SoftmaxRule):
        return {"kind": rule.kind, "positive_class": rule.positive_class}
    kind = "ordinal" if isinstance(rule, OrdinalRule) else "quantile"
    return {"kind": kind, "first_positive_class": rule.first_positive_class}


def _curve(test: Judged) -> list[float]:
    return [round(float(value), 5) for value in budget_curve(test)]


def _finite(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None
