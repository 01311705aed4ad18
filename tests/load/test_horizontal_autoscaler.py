"""The autoscaler of the load runs does what Kubernetes says that it does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.load.horizontal_autoscaler import (
    HorizontalAutoscaler,
    by_average_value,
    by_utilization,
    of_metrics,
)

UP_FAST = {
    "stabilizationWindowSeconds": 0,
    "selectPolicy": "Max",
    "policies": [
        {"type": "Percent", "value": 100, "periodSeconds": 15},
        {"type": "Pods", "value": 4, "periodSeconds": 15},
    ],
}
DOWN_SLOWLY = {
    "stabilizationWindowSeconds": 300,
    "selectPolicy": "Max",
    "policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}],
}


def scaler(least: int = 1, most: int = 100, **behavior: Any) -> HorizontalAutoscaler:
    rules = {"scaleUp": UP_FAST, "scaleDown": DOWN_SLOWLY, **behavior}
    return HorizontalAutoscaler(rules, least, most)


@pytest.mark.parametrize(
    ("total", "current", "wanted"),
    [(64, 1, 2), (65, 1, 3), (0, 3, 0), (35, 1, 1), (35.3, 1, 2), (29, 1, 1), (57, 2, 2)],
)
def test_an_average_is_spread_evenly_and_a_tenth_is_left_alone(
    total: float, current: int, wanted: int
) -> None:
    assert by_average_value(total, 32, current) == wanted


@pytest.mark.parametrize(
    ("used", "wanted"),
    [
        ([0.8], 1),
        ([1.6], 2),
        ([0.9, 0.9], 3),
        ([0.2, 0.2], 1),
        # What is not known yet uses nothing where replicas are added …
        ([2.4, None], 3),
        ([1.2, None], 2),
        # … and all that is wanted where they are taken.
        ([0.1, None], 2),
        ([None, None], 2),
    ],
)
def test_a_share_of_a_resource_is_kept(used: list[float | None], wanted: int) -> None:
    assert by_utilization(used, 0.8) == wanted


@pytest.mark.parametrize(
    ("wishes", "wanted"),
    [([2, 5], 5), ([1, 2], 2), ([None, 5], 5), ([None, 1], 3), ([None, None], 3)],
)
def test_the_highest_wish_counts_and_silence_takes_nothing_away(
    wishes: list[int | None], wanted: int
) -> None:
    assert of_metrics(wishes, 3) == wanted


def test_up_goes_by_the_policy_that_allows_most() -> None:
    autoscaler = scaler()
    assert autoscaler.replicas(50, 1, 0.0) == 5
    assert autoscaler.replicas(50, 5, 14.0) == 5
    assert autoscaler.replicas(50, 5, 15.0) == 10
    assert autoscaler.replicas(50, 10, 30.0) == 20


def test_the_policy_that_allows_least_may_count_instead_or_none() -> None:
    assert scaler(scaleUp={**UP_FAST, "selectPolicy": "Min"}).replicas(50, 1, 0.0) == 2
    assert scaler(scaleUp={**UP_FAST, "selectPolicy": "Disabled"}).replicas(50, 1, 0.0) == 1
    assert scaler(scaleDown={**DOWN_SLOWLY, "selectPolicy": "Disabled"}).replicas(1, 4, 0.0) == 4


def test_down_waits_for_the_window_and_then_goes_one_by_one() -> None:
    autoscaler = scaler()
    assert autoscaler.replicas(4, 4, 0.0) == 4
    assert autoscaler.replicas(1, 4, 15.0) == 4
    assert autoscaler.replicas(1, 4, 299.0) == 4
    assert autoscaler.replicas(1, 4, 300.0) == 3
    assert autoscaler.replicas(1, 3, 345.0) == 3
    assert autoscaler.replicas(1, 3, 360.0) == 2


def test_a_wish_within_the_window_of_going_up_holds_it_back() -> None:
    autoscaler = scaler(scaleUp={**UP_FAST, "stabilizationWindowSeconds": 60})
    assert autoscaler.replicas(1, 1, 0.0) == 1
    assert autoscaler.replicas(3, 1, 15.0) == 1
    assert autoscaler.replicas(3, 1, 60.0) == 3


def test_the_bounds_come_last() -> None:
    assert scaler(most=3).replicas(50, 1, 0.0) == 3
    assert (
        scaler(least=2, scaleDown={**DOWN_SLOWLY, "stabilizationWindowSeconds": 0}).replicas(
            0, 2, 0.0
        )
        == 2
    )


def test_a_percentage_is_taken_of_what_the_period_began_with() -> None:
    halves = {
        "stabilizationWindowSeconds": 0,
        "selectPolicy": "Max",
        "policies": [{"type": "Percent", "value": 50, "periodSeconds": 60}],
    }
    autoscaler = scaler(scaleDown=halves)
    assert autoscaler.replicas(0, 9, 0.0) == 4
    assert autoscaler.replicas(0, 4, 30.0) == 4
    assert autoscaler.replicas(0, 4, 60.0) == 2
