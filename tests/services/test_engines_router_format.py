"""Metadata that is not understood is refused, and each rule reads its logits as it says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from services.engines.router_format import (
    FormatError,
    OrdinalRule,
    PrmFormat,
    QuantileRule,
    SoftmaxRule,
    read_prm_format,
    read_router_format,
)

GOOD: dict[str, Any] = {
    "format_version": 1,
    "annotation": True,
    "score_rule": {"kind": "softmax", "positive_class": 1},
    "num_labels": 2,
    "default_threshold": 0.4,
    "calibration": [
        {"threshold": 0.2, "target_share": 0.9},
        {"threshold": 0.6, "target_share": 0.1},
    ],
    "training_data_digest": "0" * 64,
    "metrics": {"spearman": 0.3},
}


def _write(folder: Path, **changes: Any) -> Path:
    path = folder / "router.json"
    path.write_text(json.dumps(GOOD | changes))
    return path


def test_a_good_file_is_read(tmp_path: Path) -> None:
    known = read_router_format(_write(tmp_path))

    assert known.is_annotated
    assert known.score_rule == SoftmaxRule(1)
    assert (known.label_count, known.default_threshold) == (2, 0.4)
    assert known.calibration.threshold_for(0.1) == 0.6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version: unknown version 2"),
        ({"format_version": True}, "format_version: unknown version True"),
        ({"annotation": "yes"}, "annotation: expected true or false, got 'yes'"),
        ({"num_labels": 1}, "num_labels: expected at least 2, got 1"),
        ({"num_labels": 4}, "num_labels: the softmax rule reads 2 classes, got 4"),
        ({"default_threshold": 1.5}, r"default_threshold: expected a number in \[0, 1\], got 1.5"),
        ({"default_threshold": float("nan")}, "default_threshold: .* got nan"),
        ({"score_rule": "softmax"}, "score_rule: expected an object"),
        ({"score_rule": {"kind": "argmax"}}, "score_rule.kind: unknown kind 'argmax'"),
        (
            {"score_rule": {"kind": "softmax", "positive_class": 1, "temperature": 2}},
            "score_rule: unknown keys temperature",
        ),
        (
            {"score_rule": {"kind": "softmax", "positive_class": 2}},
            "positive_class: expected from 0 to 1, got 2",
        ),
        (
            {"score_rule": {"kind": "ordinal", "first_positive_class": 0}},
            "first_positive_class: expected from 1 to 1, got 0",
        ),
        ({"calibration": {}}, "calibration: expected a list of rows"),
        ({"calibration": [{"threshold": 2, "target_share": 0}]}, "threshold: expected a number"),
        (
            {
                "calibration": [
                    {"threshold": 0.5, "target_share": 0.5},
                    {"threshold": 0.4, "target_share": 0.6},
                ]
            },
            "thresholds must rise",
        ),
    ],
)
def test_a_bad_router_file_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        read_router_format(_write(tmp_path, **changes))


def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "router.json"
    with pytest.raises(FormatError, match="cannot be read"):
        read_router_format(path)
    path.write_text("{")
    with pytest.raises(FormatError, match="cannot be read"):
        read_router_format(path)
    path.write_text("[]")
    with pytest.raises(FormatError, match="expected an object"):
        read_router_format(path)


@pytest.mark.parametrize(
    "text",
    [
        '{"format_version": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"format_version": ' + "1" * 5_000 + "}",
        '{"format_version": 1, "family": "trl-token-classification", "format_version": 1}',
        '{"format_version": 1, "family": "trl-token-classification", "x": {"a": 1, "a": 2}}',
    ],
    ids=["too deep", "too many digits", "a key twice", "an inner key twice"],
)
def test_what_json_lets_pass_or_breaks_on_is_refused(tmp_path: Path, text: str) -> None:
    for name, read in (("prm.json", read_prm_format), ("router.json", read_router_format)):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(FormatError, match="cannot be read"):
            read(path)


def test_softmax_reads_two_classes() -> None:
    assert SoftmaxRule(1).score([0.0, math.log(3)]) == pytest.approx(0.75)
    assert SoftmaxRule(0).score([0.0, math.log(3)]) == pytest.approx(0.25)
    assert SoftmaxRule(1).logit_count(2) == 2


def test_quantile_sums_the_upper_classes() -> None:
    logits = [math.log(share) for share in (0.1, 0.2, 0.3, 0.4)]

    assert QuantileRule(2).score(logits) == pytest.approx(0.7)
    assert QuantileRule(1).logit_count(4) == 4


def test_ordinal_reads_one_cumulative_logit() -> None:
    logits = [math.log(9), math.log(1), math.log(1 / 4)]

    assert [OrdinalRule(k).score(logits) for k in (1, 2, 3)] == pytest.approx([0.9, 0.5, 0.2])
    assert OrdinalRule(2).logit_count(4) == 3


def test_extreme_logits_stay_within_bounds() -> None:
    assert OrdinalRule(1).score([-1e4]) == 0.0
    assert OrdinalRule(1).score([1e4]) == 1.0
    assert QuantileRule(1).score([0.0] * 7) <= 1.0
    assert SoftmaxRule(1).score([-1e4, 1e4]) == 1.0


def test_a_prm_file_says_family_separator_and_label(tmp_path: Path) -> None:
    path = tmp_path / "prm.json"
    good = {"format_version": 1, "family": "trl-token-classification"}
    path.write_text(json.dumps(good))
    assert read_prm_format(path) == PrmFormat()

    path.write_text(json.dumps(good | {"separator": "\n", "positive_label": 0}))
    assert read_prm_format(path) == PrmFormat(separator="\n", positive_label=0)

    path.write_text(json.dumps(good | {"prompt_suffix": "\n"}))
    assert read_prm_format(path) == PrmFormat(prompt_suffix="\n")

    for changes, message in (
        ({"family": "skywork"}, "family: unknown family 'skywork'"),
        ({"format_version": 3}, "format_version: unknown version 3"),
        ({"positive_label": 2}, "positive_label: expected from 0 to 1, got 2"),
        ({"separator": ""}, "separator: expected a text"),
        ({"prompt_suffix": 1}, "prompt_suffix: expected a text, got 1"),
    ):
        path.write_text(json.dumps(good | changes))
        with pytest.raises(FormatError, match=message):
            read_prm_format(path)


@pytest.mark.parametrize("name", ["logit_shift", "margin"])
def test_an_integer_that_no_float_holds_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match=f"{name}: expected a finite number"):
        read_router_format(_write(tmp_path, prior_correction={name: 10**400}))


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": ["long"] * 9_999},
        {"score_rule": {"kind": "k" * 9_999}},
        {"score_rule": {"kind": "softmax", "positive_class": 1, "a\nb" * 99: 1}},
        {"num_labels": {"x" * 999: "y" * 9_999}},
    ],
)
def test_a_refusal_is_one_short_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError) as raised:
        read_router_format(_write(tmp_path, **changes))
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 500
