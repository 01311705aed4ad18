"""What an autoscaler of the target goes by: demand that is seen in front of the target."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from arbitrage.core.errors import NotServing, TargetUnavailable
from arbitrage.v1 import orchestrator_pb2
from services.orchestrator.telemetry import TargetDemand
from tests.services.running import House, asking, refusal, solution, until

DEPTH = "arbitrage_target_queue_depth"
DEMAND = "arbitrage_target_demand_seconds"
INFLIGHT = "arbitrage_target_inflight_steps"


def asking_target(problem: str) -> orchestrator_pb2.GenerateSolutionRequest:
    """Returns a request that only the target works for."""
    request = asking(problem=problem)
    request.target_only.SetInParent()
    return request


async def test_solutions_that_wait_want_the_target_as_those_that_run_do() -> None:
    house = House(settings={"max_concurrency": 2})
    house.target.may_answer.clear()
    async with house.open() as stub:
        assert house.metric(DEPTH) == 0
        async with asyncio.TaskGroup() as group:
            for index in range(5):
                group.create_task(solution(stub, asking_target(f"{index}?")))
            await until(lambda: house.metric(INFLIGHT) == 2)
            await until(lambda: house.metric("arbitrage_solutions_waiting") == 3)
            assert house.metric(DEPTH) == 3
            house.target.may_answer.set()
        assert house.metric(DEPTH) == 0


async def test_solutions_that_wait_do_not_want_a_target_that_nobody_asks() -> None:
    house = House(settings={"max_concurrency": 1})
    house.draft.may_answer.clear()
    async with house.open() as stub, asyncio.TaskGroup() as group:
        for index in range(3):
            group.create_task(solution(stub, asking(problem=f"{index}?")))
        await until(lambda: house.metric("arbitrage_solutions_waiting") == 2)
        assert house.metric(DEPTH) == 0
        house.draft.may_answer.set()


async def test_steps_that_found_no_target_are_wanted_until_there_is_one() -> None:
    house = House()
    async with house.open() as stub:
        house.target.error = NotServing("gone")
        for index in range(2):
            assert isinstance(await refusal(stub, asking_target(f"{index}?")), TargetUnavailable)
        assert house.metric(INFLIGHT) == 0
        assert house.metric(DEPTH) == 2
        house.target.error = None
        # The pool has left it out, and takes it back once a probe finds it serving.
        ready = {"role": "target", "state": "ready"}
        await until(lambda: house.metric("arbitrage_pool_replicas", **ready) == 1)
        await solution(stub, asking_target("2?"))
        assert house.metric(DEPTH) == 0


class Demand:
    """A target's demand under a clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._registry = CollectorRegistry()
        self._demand = TargetDemand(self._registry, lambda: self.now_s)

    def ask(self, per_s: int, seconds: int, took_s: float | None) -> None:
        """Asks for steps at even times; `took_s` is what each takes, None if none is written."""
        for _ in range(per_s * seconds):
            self.now_s += 1 / per_s
            self._demand.begin()
            self._demand.end(took_s)

    def value(self) -> float:
        """Returns the metric."""
        found = self._registry.get_sample_value(DEMAND)
        assert found is not None
        return found


def test_demand_is_how_often_the_target_is_asked_times_the_time_of_its_steps() -> None:
    demand = Demand()
    demand.ask(per_s=4, seconds=120, took_s=3.0)
    assert demand.value() == pytest.approx(12.0, rel=0.05)


def test_demand_rises_with_the_load_before_a_step_of_it_is_written() -> None:
    demand = Demand()
    demand.ask(per_s=2, seconds=120, took_s=3.0)
    before = demand.value()
    demand.ask(per_s=10, seconds=15, took_s=None)
    assert demand.value() > 3 * before


def test_demand_is_gone_within_a_minute_of_the_load() -> None:
    demand = Demand()
    demand.ask(per_s=4, seconds=120, took_s=3.0)
    demand.now_s += 60
    assert demand.value() < 0.3


def test_demand_is_there_while_no_target_is_and_its_steps_were_known() -> None:
    demand = Demand()
    demand.ask(per_s=4, seconds=120, took_s=3.0)
    demand.now_s += 600
    demand.ask(per_s=4, seconds=30, took_s=None)
    assert demand.value() > 9


async def test_an_orchestrator_shows_the_demand_of_its_escalations() -> None:
    house = House()
    async with house.open() as stub:
        await solution(stub, asking_target("1?"))
        assert house.metric(DEMAND) > 0  # type: ignore[operator]  # it is there
