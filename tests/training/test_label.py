"""Labels, splits and balance, from rows alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arbitrage.core.steps import ModelIdentity
from router_training.config import Label
from router_training.dataset import make_dataset
from router_training.errors import DatasetInvalid
from router_training.label import (
    advantage,
    balanced,
    binary_label,
    class_edges,
    class_of,
    distinct,
    prior_logit_shift,
)
from router_training.rows import Row
from tests.training.rows import a_row


def rows_of(count: int, better: int) -> list[Row]:
    """Returns rows of as many questions, the first `better` of which have an advantage."""
    return [
        a_row(problem=f"{n}?", draft_score=0.5, target_scores=(0.9 if n < better else 0.5,))
        for n in range(count)
    ]


def test_a_tie_is_no_advantage() -> None:
    assert binary_label(advantage(0.5, [0.5])) == 0


@given(st.floats(0, 1), st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_an_advantage_is_the_mean_of_the_samples_minus_the_draft(
    draft: float, targets: list[float]
) -> None:
    assert advantage(draft, targets) == pytest.approx(math.fsum(targets) / len(targets) - draft)


@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=60),
    st.sampled_from([2, 4, 10]),
    st.sampled_from([0.0, 0.1]),
)
def test_the_upper_half_of_the_classes_is_what_lies_above_the_margin(
    gaps: list[float], class_count: int, margin: float
) -> None:
    try:
        edges = class_edges(gaps, class_count, margin)
    except DatasetInvalid:
        return
    assert len(edges) == class_count - 1
    for gap in gaps:
        assert (class_of(gap, edges) >= class_count // 2) == (gap > margin)


def test_too_few_advantages_for_the_classes_are_an_error() -> None:
    with pytest.raises(DatasetInvalid, match=r"label\.class_count: 4 classes need 2 distinct"):
        class_edges([-0.1, 0.0, 0.2, 0.3], 4, 0.0)


def test_balancing_keeps_every_row_of_the_rarer_label() -> None:
    rows = rows_of(40, 8)
    chosen = balanced(rows, 0.0, 1)
    assert len(chosen) == 16
    assert {r.question_id for r in chosen if r.label} == {r.question_id for r in rows[:8]}
    assert balanced(rows, 0.0, 1) == chosen
    assert balanced(rows, 0.0, 2) != chosen


def test_labels_that_are_all_equal_are_an_error() -> None:
    with pytest.raises(DatasetInvalid, match="all 10 training rows have label 0"):
        balanced(rows_of(10, 0), 0.0, 0)


def test_the_prior_shift_is_the_logit_of_the_natural_share() -> None:
    assert prior_logit_shift(rows_of(40, 8), 0.0) == pytest.approx(math.log(0.2 / 0.8))


def test_a_prefix_that_two_walks_met_is_one_row() -> None:
    row = a_row()
    assert len(distinct([row, replace(row, request_id="other"), a_row(draft_text="9")])) == 2


def test_all_rows_of_a_question_are_in_one_split() -> None:
    rows = [
        a_row(problem=f"{n}?", step_index=i, draft_text=f"{n} {i}", target_scores=(0.3 * i,))
        for n in range(200)
        for i in range(3)
    ]
    dataset = make_dataset(rows, Label(validation_share=0.2, test_share=0.2, balanced=False))
    splits = (dataset.training, dataset.validation, dataset.test)
    ids = [{row.question_id for row in split} for split in splits]
    assert not ids[0] & ids[1]
    assert not (ids[0] | ids[1]) & ids[2]
    assert sum(map(len, splits)) == 600
    assert 20 < len(ids[1]) < 60
    assert 20 < len(ids[2]) < 60


def test_only_the_training_rows_are_balanced() -> None:
    dataset = make_dataset(rows_of(300, 60), Label(validation_share=0.2, test_share=0.2))
    assert sum(row.label for row in dataset.training) * 2 == len(dataset.training)
    share = sum(row.label for row in dataset.test) / len(dataset.test)
    assert share < 0.35
    assert dataset.logit_shift == pytest.approx(
        math.log(dataset.positive_share / (1 - dataset.positive_share))
    )


def test_rows_of_two_prms_are_refused() -> None:
    rows = rows_of(30, 10)
    rows[3] = replace(rows[3], prm=ModelIdentity("prm", "r2"))
    with pytest.raises(DatasetInvalid, match=r"2 models as prm \(prm@r1, prm@r2\)"):
        make_dataset(rows, Label())


def test_an_empty_split_is_named() -> None:
    with pytest.raises(DatasetInvalid, match=r"the (validation|test) split of 2 rows is empty"):
        make_dataset(rows_of(2, 1), Label())
