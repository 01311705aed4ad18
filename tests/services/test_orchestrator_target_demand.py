"""What an autoscaler of the target goes by: demand that is seen in front of the target."""

from __future__ import annotations

import asyncio

from arbitrage.core.errors import NotServing, TargetUnavailable
from arbitrage.v1 import orchestrator_pb2
from tests.services.running import House, asking, refusal, solution, until

DEPTH = "arbitrage_target_queue_depth"
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
