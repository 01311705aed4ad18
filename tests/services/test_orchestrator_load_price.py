"""The load-priced threshold: it rises with the target's load, as far as a caller allows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from arbitrage.core.errors import ThresholdOutOfRange
from arbitrage.core.events import StepCommitted
from arbitrage.core.policies import ArbitragePolicy
from arbitrage.core.speculation import SolutionRequest
from arbitrage.core.steps import Degradation
from arbitrage.v1 import orchestrator_pb2 as pb
from arbitrage.v1 import orchestrator_pb2_grpc
from arbitrage.v1.trajectory_pb2 import SOURCE_DRAFT, SOURCE_TARGET
from services.orchestrator.load_price import LoadPricedPolicy, TargetPrice
from tests.fakes import PoolStep, PoolWorld, events_of
from tests.services.running import House, asking, committed, refusal, solution, until

UNITS = st.floats(0.0, 1.0)


@given(st.integers(1, 100), st.integers(0, 500), st.integers(0, 500))
def test_the_price_lies_in_0_to_1_and_never_falls_as_the_target_gets_more_to_do(
    capacity: int, some: int, others: int
) -> None:
    fewer, more = sorted((some, others))
    low, high = TargetPrice(capacity, lambda: fewer)(), TargetPrice(capacity, lambda: more)()
    assert 0.0 <= low <= high <= 1.0
    assert (low == 0.0) == (fewer <= capacity)
    assert (high == 1.0) == (more >= 2 * capacity)


def test_without_a_capacity_the_target_costs_nothing() -> None:
    assert TargetPrice(None, lambda: 10**6)() == 0.0


# In floats, 0.03 + (0.29 - 0.03) is more than 0.29, and the second such sum less than its end.
@example(0.5, 0.03, 0.29, 30)
@example(0.0, 0.23183564432086007, 0.99999, 20)
@given(UNITS, UNITS, UNITS, st.integers(0, 30))
def test_the_threshold_lies_between_what_was_asked_for_and_what_was_allowed(
    score: float, base: float, most: float, inflight_count: int
) -> None:
    world = PoolWorld([PoolStep(0.5, 0.5, score)])
    policy = LoadPricedPolicy(ArbitragePolicy(base), most, TargetPrice(10, lambda: inflight_count))
    events = asyncio.run(events_of(SolutionRequest("1 + 1?", policy), world.models))
    (step,) = (event for event in events if isinstance(event, StepCommitted))
    verdict = step.verdict
    assert verdict is not None
    assert verdict.threshold is not None
    assert base <= verdict.threshold <= max(base, most)
    assert verdict.escalate == (score > verdict.threshold)
    # Flagged if and only if it was raised.
    assert verdict.is_load_priced == (verdict.threshold > base)
    flags = (Degradation.LOAD_PRICED_THRESHOLD,) if verdict.is_load_priced else ()
    assert step.degradations == flags
    if inflight_count <= 10:
        assert not verdict.is_load_priced
    if inflight_count >= 20:
        assert verdict.threshold == max(base, most)


def priced(most: float | None, least: float | None = None) -> pb.ArbitragePolicy:
    """Returns the policy with its bounds."""
    return pb.ArbitragePolicy(escalation_threshold=least, max_escalation_threshold=most)


@pytest.fixture
def house() -> House:
    house = House(settings={"target_step_capacity": 1, "prefix_cache_mib": 0})
    # Above the router's threshold of 0.4, and above that asked for in these tests.
    house.router.score = 0.5
    return house


@asynccontextmanager
async def busy_target(
    house: House,
) -> AsyncIterator[orchestrator_pb2_grpc.OrchestratorServiceAsyncStub]:
    """Opens the house, with two steps on the way that the target does not end."""
    house.target.may_answer.clear()
    async with house.open() as stub, asyncio.TaskGroup() as group:
        calls = [
            group.create_task(solution(stub, asking(problem=f"busy {n}", arbitrage=priced(None))))
            for n in range(2)
        ]
        await until(lambda: house.metric("arbitrage_target_inflight_steps") == 2)
        yield stub
        house.target.may_answer.set()
        for call in calls:
            steps = committed(await call)
            assert {step.step.source for step in steps} == {SOURCE_TARGET}


async def test_a_saturated_target_is_spared_where_the_caller_allows_it(house: House) -> None:
    async with busy_target(house) as stub:
        assert house.metric("arbitrage_target_price") == 1.0
        steps = committed(await solution(stub, asking(arbitrage=priced(0.75, 0.25))))
        degraded = house.metric("arbitrage_steps_total", source="draft", degraded="true")
    assert {step.step.source for step in steps} == {SOURCE_DRAFT}
    assert [list(step.degradations) for step in steps] == [
        [pb.DEGRADATION_LOAD_PRICED_THRESHOLD]
    ] * 3
    assert [step.threshold for step in steps] == [0.75] * 3
    assert degraded == 3


async def test_the_routers_own_threshold_rises_too(house: House) -> None:
    async with busy_target(house) as stub:
        steps = committed(await solution(stub, asking(arbitrage=priced(0.75))))
    assert [step.threshold for step in steps] == [0.75] * 3


async def test_without_leave_or_without_load_nothing_changes(house: House) -> None:
    async with house.open() as stub:
        assert house.metric("arbitrage_target_price") == 0.0
        steps = committed(await solution(stub, asking(arbitrage=priced(0.75, 0.25))))
    assert {step.step.source for step in steps} == {SOURCE_TARGET}
    assert not any(step.degradations for step in steps)
    # The other half, requests without the field while the target is busy, is in `busy_target`.


async def test_a_step_at_a_raised_threshold_is_no_feedback(house: House, tmp_path: Path) -> None:
    house.settings |= {
        "feedback_sample_rate": 1.0,
        "feedback_folder": str(tmp_path),
        "feedback_max_target_inflight": 100,
    }
    async with busy_target(house) as stub:
        before = {
            result: house.metric("arbitrage_feedback_records_total", result=result)
            for result in ("written", "no_room", "failed")
        }
        await solution(stub, asking(arbitrage=priced(0.75, 0.25)))
        for result, count in before.items():
            assert house.metric("arbitrage_feedback_records_total", result=result) == count


@pytest.mark.parametrize(
    ("least", "most"), [(0.5, 0.25), (None, 1.5), (None, -0.5), (0.5, float("nan"))]
)
async def test_a_bound_that_makes_no_sense_is_refused_by_its_name(
    house: House, least: float | None, most: float
) -> None:
    async with house.open() as stub:
        error = await refusal(stub, asking(arbitrage=priced(most, least)))
    assert isinstance(error, ThresholdOutOfRange)
    assert error.field == "arbitrage.max_escalation_threshold"
    assert (error.value, "give a number" in error.fix) == (str(most), True)
