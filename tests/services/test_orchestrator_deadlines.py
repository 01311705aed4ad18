"""A caller's own deadline, hop by hop: each hop ends its work before the one in front gives up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration

from arbitrage.core.errors import DeadlineExceeded
from arbitrage.core.ports import StepRequest
from arbitrage.core.steps import GeneratedStep, StopReason
from arbitrage.status import from_rpc_error
from arbitrage.v1 import (
    generator_pb2,
    generator_pb2_grpc,
    prm_pb2,
    prm_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
)
from arbitrage.v1 import orchestrator_pb2 as pb
from arbitrage.v1.trajectory_pb2 import (
    SOURCE_DRAFT,
    STOP_REASON_DEADLINE,
    STOP_REASON_END_OF_SEQUENCE,
    STOP_REASON_SEPARATOR,
)
from arbitrage.v1.trajectory_pb2 import Step as StepMessage
from services.generator.servicer import GeneratorServicer
from services.prm.servicer import PrmServicer
from services.router.servicer import RouterServicer
from tests.services.fakes_engines import (
    FakeEngine,
    FakeGeneratorEngine,
    FakePrmEngine,
    FakeRouterEngine,
)
from tests.services.redis_servers import redis_server
from tests.services.running import (
    GENERATOR,
    PRM,
    ROUTER,
    House,
    Solution,
    asking,
    committed,
    serving,
    solution,
    until,
)


@dataclass
class SlowGeneratorEngine(FakeGeneratorEngine):
    """Writes the first step, and is at the next one until its time is over."""

    async def generate_step(
        self, request: StepRequest
    ) -> AsyncGenerator[str | GeneratedStep, None]:
        """Yields the step, cut by its time limit where it is not the first."""
        async for item in super().generate_step(request):
            if isinstance(item, GeneratedStep) and request.trajectory.steps:
                assert request.time_limit_s is not None
                await asyncio.sleep(request.time_limit_s)
                yield replace(item, stop_reason=StopReason.DEADLINE)
            else:
                yield item


@pytest.fixture
def house() -> House:
    return House(draft=SlowGeneratorEngine())


async def within(stub: Any, timeout_s: float, request: pb.GenerateSolutionRequest) -> Solution:
    """Returns all events of a solution whose call has `timeout_s` seconds."""
    return [event async for event in stub.GenerateSolution(request, timeout=timeout_s)]


async def test_a_solution_that_only_its_call_bounds_ends_with_what_there_is(house: House) -> None:
    async with house.open() as stub:
        events = await within(stub, 4.0, asking())
    assert len(committed(events)) == 1
    assert events[-1].finished.stop_reason == STOP_REASON_DEADLINE
    first, second = (request.time_limit_s for request in house.draft.requests)
    # Something is kept back for the way to the caller, and each step gets what is left.
    assert first is not None
    assert second is not None
    assert second < first < 4.0


async def test_the_shorter_of_time_limit_and_deadline_bounds_the_solution(house: House) -> None:
    async with house.open() as stub:
        limit = pb.Budgets(time_limit=Duration(nanos=500_000_000))
        events = await within(stub, 60.0, asking(budgets=limit))
        assert events[-1].finished.stop_reason == STOP_REASON_DEADLINE
        limit = pb.Budgets(time_limit=Duration(seconds=60))
        events = await within(stub, 4.0, asking(problem="another", budgets=limit))
    assert events[-1].finished.stop_reason == STOP_REASON_DEADLINE
    limits_s = [request.time_limit_s or 0.0 for request in house.draft.requests]
    assert limits_s[0] <= 0.5
    assert limits_s[2] < 4.0


async def test_a_session_outlives_the_call_whose_deadline_ended_it(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        shared = {"store_url": server.url, "prefix_cache_mib": 0}
        slow = House(draft=SlowGeneratorEngine(), settings=shared)
        async with slow.open() as stub:
            cut = await within(stub, 4.0, asking(request_id="one"))
        assert cut[-1].finished.stop_reason == STOP_REASON_DEADLINE
        async with House(settings=shared).open() as stub:
            events = await solution(stub, asking(request_id="one", resume_after_step=1))
    assert [step.step_index for step in committed(events)] == [1, 2]
    assert events[-1].finished.stop_reason == STOP_REASON_END_OF_SEQUENCE


async def test_a_time_limit_ends_a_session_for_good(tmp_path: Path) -> None:
    limit = pb.Budgets(time_limit=Duration(nanos=500_000_000))
    request = asking(request_id="one", budgets=limit)
    with redis_server(tmp_path) as server:
        house = House(
            draft=SlowGeneratorEngine(),
            settings={"store_url": server.url, "prefix_cache_mib": 0},
        )
        async with house.open() as stub:
            first = await within(stub, 60.0, request)
            calls = house.draft.call_count
            again = await within(stub, 60.0, request)
    assert again == [event for event in first if not event.HasField("draft_proposed")]
    assert again[-1].finished.stop_reason == STOP_REASON_DEADLINE
    assert house.draft.call_count == calls


async def test_a_call_whose_deadline_comes_in_the_queue_ends_there(house: House) -> None:
    house = House(settings={"max_concurrency": 1})
    house.draft.may_answer.clear()
    async with house.open() as stub, asyncio.TaskGroup() as group:
        first = group.create_task(solution(stub, asking()))
        await until(lambda: house.draft.call_count)
        late = await within(stub, 3.0, asking(problem="late"))
        house.draft.may_answer.set()
        await first
        assert house.metric("arbitrage_admissions_total", result="expired") == 1
    assert [event.finished.stop_reason for event in late] == [STOP_REASON_DEADLINE]


STEP = StepMessage(text="one", source=SOURCE_DRAFT, stop_reason=STOP_REASON_SEPARATOR)


async def generates(channel: grpc.aio.Channel) -> None:
    """Asks a generator, with a deadline and no time limit."""
    stub: generator_pb2_grpc.GeneratorServiceAsyncStub
    stub = generator_pb2_grpc.GeneratorServiceStub(channel)
    request = generator_pb2.GenerateStepRequest(problem="p", stream_text=True)
    _ = [message async for message in stub.GenerateStep(request, timeout=0.5)]


async def scores(channel: grpc.aio.Channel) -> None:
    """Asks a PRM."""
    stub: prm_pb2_grpc.PrmServiceAsyncStub = prm_pb2_grpc.PrmServiceStub(channel)
    await stub.ScoreSteps(prm_pb2.ScoreStepsRequest(problem="p", steps=[STEP]), timeout=0.5)


async def estimates(channel: grpc.aio.Channel) -> None:
    """Asks a router."""
    stub: router_pb2_grpc.RouterServiceAsyncStub = router_pb2_grpc.RouterServiceStub(channel)
    request = router_pb2.EstimateAdvantageRequest(problem="p", candidate="one")
    await stub.EstimateAdvantage(request, timeout=0.5)


@pytest.mark.parametrize("role", ["generator", "prm", "router"])
async def test_a_models_work_stops_when_its_callers_deadline_passes(role: str) -> None:
    engine: FakeEngine
    servicer: object
    match role:
        case "generator":
            engine = written = FakeGeneratorEngine()
            service, servicer, ask = GENERATOR, GeneratorServicer(written, 99), generates
        case "prm":
            engine = scored = FakePrmEngine()
            service, servicer, ask = PRM, PrmServicer(scored), scores
        case _:
            engine = judged = FakeRouterEngine()
            service, servicer, ask = ROUTER, RouterServicer(judged), estimates
    engine.may_answer.clear()
    async with (
        serving(service, servicer) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await ask(channel)
        assert isinstance(from_rpc_error(raised.value), DeadlineExceeded)
        await until(lambda: engine.cancelled_count)
