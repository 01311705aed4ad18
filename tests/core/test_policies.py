"""The oracle is an upper bound, and a bad threshold is refused by name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arbitrage.core.errors import ArbitrageError, FieldInvalid, ThresholdOutOfRange
from arbitrage.core.events import StepCommitted
from arbitrage.core.policies import (
    POLICIES,
    ArbitragePolicy,
    FirstTokenEntropyPolicy,
    OraclePolicy,
    Policy,
    RandomPolicy,
    RsdPolicy,
)
from arbitrage.core.speculation import SolutionRequest
from arbitrage.core.steps import Source
from tests.fakes import PoolStep, PoolWorld, events_of

scores = st.floats(0.0, 1.0, allow_nan=False, width=32)
pools = st.lists(
    st.builds(PoolStep, draft_score=scores, target_score=scores, router_score=scores),
    min_size=1,
    max_size=12,
)


def outcome(pool: list[PoolStep], policy: Policy) -> tuple[int, float]:
    """Returns how many steps were escalated and the reward of the steps committed."""
    events = asyncio.run(events_of(SolutionRequest("p", policy), PoolWorld(pool).models))
    sources = [event.step.source for event in events if isinstance(event, StepCommitted)]
    reward = sum(
        at.target_score if source is Source.TARGET else at.draft_score
        for at, source in zip(pool, sources, strict=True)
    )
    return sources.count(Source.TARGET), reward


@settings(max_examples=40, deadline=None)
@given(pools)
def test_no_choice_of_escalations_beats_the_oracle_at_its_own_budget(pool: list[PoolStep]) -> None:
    advantages = sorted({at.target_score - at.draft_score for at in pool})
    base = sum(at.draft_score for at in pool)
    gains = [at.target_score - at.draft_score for at in pool]
    for threshold in (-1.0, *advantages, 1.0):
        budget, reward = outcome(pool, OraclePolicy(threshold))
        best = max(base + sum(chosen) for chosen in combinations(gains, budget))
        assert reward >= best - 1e-9


@settings(max_examples=40, deadline=None)
@given(pools, scores)
def test_no_other_rule_beats_the_oracle_at_equal_escalations(
    pool: list[PoolStep], threshold: float
) -> None:
    gains = sorted((at.target_score - at.draft_score for at in pool), reverse=True)
    base = sum(at.draft_score for at in pool)
    for policy in (ArbitragePolicy(threshold), RsdPolicy(threshold), RandomPolicy(threshold)):
        budget, reward = outcome(pool, policy)
        assert reward <= base + sum(gains[:budget]) + 1e-9


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (ArbitragePolicy, "arbitrage.escalation_threshold"),
        (RsdPolicy, "rsd.acceptance_score"),
        (RandomPolicy, "random.escalation_rate"),
        (OraclePolicy, "oracle.advantage_threshold"),
        (FirstTokenEntropyPolicy, "first_token_entropy.entropy_threshold"),
    ],
)
@pytest.mark.parametrize("value", [-1.5, 100.5, float("nan"), float("inf")])
def test_a_threshold_outside_its_range_is_refused_by_name(
    build: Callable[[float], Policy], field: str, value: float
) -> None:
    with pytest.raises(ThresholdOutOfRange) as refused:
        build(value)
    assert refused.value.field == field
    assert str(value) in str(refused.value)


def test_an_entropy_over_no_tokens_is_refused() -> None:
    with pytest.raises(FieldInvalid, match="token_count"):
        FirstTokenEntropyPolicy(1.0, 0)


def test_policies_have_the_names_of_the_api() -> None:
    from arbitrage.v1 import orchestrator_pb2

    descriptor = orchestrator_pb2.GenerateSolutionRequest.DESCRIPTOR
    fields = [field.name for field in descriptor.oneofs_by_name["policy"].fields]
    assert [policy.name for policy in POLICIES] == fields


def test_every_reason_of_the_error_tree_is_documented_in_the_api_and_the_other_way_round() -> None:
    from arbitrage.core.errors import leaves
    from arbitrage.v1.error_reason_pb2 import ErrorReason

    documented = {name.removeprefix("ERROR_REASON_") for name in ErrorReason.keys()}  # noqa: SIM118
    found = [leaf.reason for leaf in leaves(ArbitrageError)]
    assert len(found) == len(set(found))
    assert set(found) | {"UNSPECIFIED"} == documented
