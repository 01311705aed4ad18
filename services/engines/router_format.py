"""Reads `router.json` and `prm.json`: what a checkpoint says of its head, checked strictly.

A head read by the wrong rule gives plausible nonsense, so anything not understood is refused.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from arbitrage.core.calibration import CalibrationTable
from arbitrage.core.ports import RouterDescription
from arbitrage.core.shown import one_line, shown
from arbitrage.core.steps import SEPARATOR, ModelIdentity

FORMAT_VERSION = 1
TRL_FAMILY = "trl-token-classification"


class FormatError(ValueError):
    """A metadata file cannot be used. The message names field, value and fix."""


@dataclass(frozen=True, slots=True)
class SoftmaxRule:
    """Two classes; the score is the probability of `positive_class`."""

    positive_class: int
    kind: str = "softmax"

    def logit_count(self, label_count: int) -> int:
        """Returns how many logits a head for `label_count` classes has."""
        return label_count

    def score(self, logits: Sequence[float]) -> float:
        """Returns the probability in [0, 1] that the step is better."""
        return _softmax(logits)[self.positive_class]


@dataclass(frozen=True, slots=True)
class QuantileRule:
    """K classes by rising advantage; the score is the probability of `first_positive_class` up."""

    first_positive_class: int
    kind: str = "quantile"

    def logit_count(self, label_count: int) -> int:
        """Returns how many logits a head for `label_count` classes has."""
        return label_count

    def score(self, logits: Sequence[float]) -> float:
        """Returns the probability in [0, 1] that the step is better."""
        return min(1.0, math.fsum(_softmax(logits)[self.first_positive_class :]))


@dataclass(frozen=True, slots=True)
class OrdinalRule:
    """K classes by K - 1 logits; sigmoid of logit j is the probability of a class above j."""

    first_positive_class: int
    kind: str = "ordinal"

    def logit_count(self, label_count: int) -> int:
        """Returns how many logits a head for `label_count` classes has."""
        return label_count - 1

    def score(self, logits: Sequence[float]) -> float:
        """Returns the probability in [0, 1] that the step is better."""
        return _sigmoid(logits[self.first_positive_class - 1])


ScoreRule: TypeAlias = SoftmaxRule | QuantileRule | OrdinalRule


@dataclass(frozen=True, slots=True)
class RouterFormat:
    """What `router.json` says: how the input is written and how the logits are read.

    A score, its logit shifted by `prior_logit_shift`, is the probability of an advantage above
    `advantage_margin` among steps as they come; training on balanced rows moves it away from that.
    """

    is_annotated: bool
    score_rule: ScoreRule
    label_count: int
    default_threshold: float
    calibration: CalibrationTable
    prior_logit_shift: float = 0.0
    advantage_margin: float = 0.0

    def description(self, identity: ModelIdentity) -> RouterDescription:
        """Returns what the router of that identity says of itself."""
        return RouterDescription(
            model=identity,
            default_threshold=self.default_threshold,
            calibration=self.calibration,
            is_annotated=self.is_annotated,
            score_rule=self.score_rule.kind,
            prior_logit_shift=self.prior_logit_shift,
            advantage_margin=self.advantage_margin,
        )


@dataclass(frozen=True, slots=True)
class PrmFormat:
    """What `prm.json` says; the defaults are those of TRL's trainer.

    `prompt_suffix` stands between the problem and the first step.
    """

    family: str = TRL_FAMILY
    separator: str = SEPARATOR
    positive_label: int = 1
    prompt_suffix: str = ""


def read_router_format(path: Path) -> RouterFormat:
    """Reads a `router.json`. Further keys (metrics, base, digests) are for people and ignored.

    Raises:
        FormatError
    """
    fields = _read_object(path)
    label_count = _integer(fields, "num_labels", minimum=2)
    prior = fields.get("prior_correction", {})
    if not isinstance(prior, dict):
        raise FormatError(f"prior_correction: expected an object, got {shown(prior)}")
    return RouterFormat(
        is_annotated=_boolean(fields, "annotation"),
        score_rule=_score_rule(fields.get("score_rule"), label_count),
        label_count=label_count,
        default_threshold=_share(fields, "default_threshold"),
        calibration=_calibration(fields.get("calibration", [])),
        prior_logit_shift=_number(prior, "logit_shift", 0.0),
        advantage_margin=_number(prior, "margin", 0.0),
    )


def read_prm_format(path: Path) -> PrmFormat:
    """Reads a `prm.json`.

    Raises:
        FormatError
    """
    fields = _read_object(path)
    family = fields.get("family")
    if family != TRL_FAMILY:
        raise FormatError(
            f"family: unknown family {shown(family)}; this version reads {TRL_FAMILY!r}"
        )
    separator = _text(fields, "separator", SEPARATOR)
    if not separator:
        raise FormatError("separator: expected a text, got ''")
    positive_label = _integer({"positive_label": 1, **fields}, "positive_label", maximum=1)
    return PrmFormat(TRL_FAMILY, separator, positive_label, _text(fields, "prompt_suffix", ""))


def _read_object(path: Path) -> Mapping[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_key_once)
    except (OSError, ValueError, RecursionError) as error:
        # A ValueError is bad UTF-8, no JSON, a key twice, or a number of thousands of digits.
        raise FormatError(f"cannot be read ({error})") from error
    if not isinstance(fields, dict):
        raise FormatError(f"expected an object, got {type(fields).__name__}")
    version = fields.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise FormatError(
            f"format_version: unknown version {shown(version)}; this program reads {FORMAT_VERSION}"
        )
    return fields


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{shown(twice)} stands there twice")
    return fields


def _score_rule(rule: Any, label_count: int) -> ScoreRule:
    if not isinstance(rule, dict):
        raise FormatError(f"score_rule: expected an object, got {shown(rule)}")
    kind = rule.get("kind")
    keys = {
        "softmax": "positive_class",
        "quantile": "first_positive_class",
        "ordinal": "first_positive_class",
    }
    if not isinstance(kind, str) or kind not in keys:
        raise FormatError(f"score_rule.kind: unknown kind {shown(kind)}; one of {', '.join(keys)}")
    if unknown := sorted(set(rule) - {"kind", keys[kind]}):
        names = one_line(", ".join(unknown))
        raise FormatError(f"score_rule: unknown keys {names} for kind {kind!r}")
    lowest = 0 if kind == "softmax" else 1
    chosen = _integer(rule, keys[kind], minimum=lowest, maximum=label_count - 1)
    if kind == "softmax":
        if label_count != 2:
            raise FormatError(
                f"num_labels: the softmax rule reads 2 classes, got {label_count}; "
                "use the quantile rule for more"
            )
        return SoftmaxRule(chosen)
    return QuantileRule(chosen) if kind == "quantile" else OrdinalRule(chosen)


def _calibration(rows: Any) -> CalibrationTable:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise FormatError(f"calibration: expected a list of rows, got {shown(rows)}")
    thresholds = tuple(_share(row, "threshold") for row in rows)
    shares = tuple(_share(row, "target_share") for row in rows)
    try:
        return CalibrationTable(thresholds, shares)
    except ValueError as error:
        raise FormatError(str(error)) from error


def _integer(
    fields: Mapping[str, Any], name: str, minimum: int = 0, maximum: int | None = None
) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise FormatError(f"{name}: expected an integer, got {shown(value)}")
    if value < minimum or (maximum is not None and value > maximum):
        bound = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise FormatError(f"{name}: expected {bound}, got {value}")
    return value


def _text(fields: Mapping[str, Any], name: str, default: str) -> str:
    value = fields.get(name, default)
    if not isinstance(value, str):
        raise FormatError(f"{name}: expected a text, got {shown(value)}")
    return value


def _share(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise FormatError(f"{name}: expected a number in [0, 1], got {shown(value)}")
    return float(value)


def _number(fields: Mapping[str, Any], name: str, default: float) -> float:
    value = fields.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not _is_finite(value):
        raise FormatError(f"prior_correction.{name}: expected a finite number, got {shown(value)}")
    return float(value)


def _is_finite(value: float) -> bool:
    # Not math.isfinite, which cannot take an integer that no float holds.
    return abs(value) <= sys.float_info.max


def _boolean(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if not isinstance(value, bool):
        raise FormatError(f"{name}: expected true or false, got {shown(value)}")
    return value


def _softmax(logits: Sequence[float]) -> list[float]:
    highest = max(logits)
    weights = [math.exp(logit - highest) for logit in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))
