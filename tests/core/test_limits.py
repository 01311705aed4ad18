"""Budgets and calibration refuse what they cannot keep, naming field, value and fix."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arbitrage.core.calibration import CalibrationTable
from arbitrage.core.errors import BudgetOutOfRange, ProblemEmpty, ProblemTooLarge
from arbitrage.core.limits import Budgets, Caps, check_budgets, check_problem


@pytest.mark.parametrize(
    ("budgets", "field"),
    [
        (Budgets(max_steps=0), "budgets.max_steps"),
        (Budgets(max_steps=-3), "budgets.max_steps"),
        (Budgets(max_steps=10_000), "budgets.max_steps"),
        (Budgets(max_tokens=-1), "budgets.max_tokens"),
        (Budgets(max_step_tokens=0), "budgets.max_step_tokens"),
        (Budgets(max_target_steps=-1), "budgets.max_target_steps"),
        (Budgets(time_limit_s=0.0), "budgets.time_limit"),
        (Budgets(time_limit_s=-2.0), "budgets.time_limit"),
        (Budgets(time_limit_s=float("nan")), "budgets.time_limit"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused_by_name(budgets: Budgets, field: str) -> None:
    with pytest.raises(BudgetOutOfRange) as refused:
        check_budgets(budgets, Caps())
    assert refused.value.field == field
    assert "range" in refused.value.fix


def test_a_budget_of_no_target_steps_is_taken() -> None:
    check_budgets(Budgets(max_target_steps=0), Caps())


@pytest.mark.parametrize("problem", ["", "   ", "\n\t"])
def test_a_problem_without_text_is_refused(problem: str) -> None:
    with pytest.raises(ProblemEmpty):
        check_problem(problem, Caps())


def test_a_problem_is_measured_in_bytes_and_its_error_is_short() -> None:
    check_problem("é" * 5, Caps(max_problem_bytes=10))
    with pytest.raises(ProblemTooLarge) as refused:
        check_problem("é" * 6, Caps(max_problem_bytes=10))
    assert "12 bytes" in str(refused.value)


@given(
    st.lists(st.floats(0.01, 0.99), min_size=1, max_size=9, unique=True).map(sorted),
    st.data(),
)
def test_a_larger_share_never_gives_a_higher_threshold(
    thresholds: list[float], data: st.DataObject
) -> None:
    size = len(thresholds)
    shares = sorted(
        data.draw(st.lists(st.floats(0.0, 1.0), min_size=size, max_size=size)), reverse=True
    )
    table = CalibrationTable(tuple(thresholds), tuple(shares))
    low, high = sorted([data.draw(st.floats(0.0, 1.0)), data.draw(st.floats(0.0, 1.0))])
    assert 0.0 <= table.threshold_for(high) <= table.threshold_for(low) <= 1.0


@pytest.mark.parametrize(
    ("thresholds", "shares", "complaint"),
    [
        ((0.1, 0.2), (0.5,), "one share per threshold"),
        ((0.2, 0.1), (0.5, 0.4), "must rise"),
        ((0.1, 0.2), (0.4, 0.5), "must rise"),
        ((0.1, 1.2), (0.5, 0.4), "outside"),
        ((0.1, float("nan")), (0.5, 0.4), "outside"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(
    thresholds: tuple[float, ...], shares: tuple[float, ...], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        CalibrationTable(thresholds, shares)
