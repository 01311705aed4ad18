"""What a caller sees when something breaks: the design's table, a test for each of its rows.

Servers, Redis and processes are real; what breaks is stopped or killed while a request runs.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from arbitrage.client import AsyncArbitrageClient, DraftOnly
from arbitrage.core.errors import Overloaded
from arbitrage.core.events import StepCommitted
from arbitrage.v1 import generator_pb2, generator_pb2_grpc, orchestrator_pb2_grpc
from arbitrage.v1 import orchestrator_pb2 as pb
from arbitrage.v1.trajectory_pb2 import SOURCE_DRAFT, SOURCE_TARGET
from services.generator.servicer import GeneratorServicer
from tests.services.fakes_engines import FakeGeneratorEngine, numbered
from tests.services.redis_servers import RedisServer, redis_server
from tests.services.running import (
    GENERATOR,
    ORCHESTRATOR,
    House,
    Solution,
    asking,
    committed,
    refusal,
    serving,
    solution,
    until,
)
from tests.services.test_rpc_core_log import orchestrator
from tests.services.test_servicer_processes import PROBLEM, ended, ready, started

ARBITRAGE = pb.ArbitragePolicy()
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture
def house() -> House:
    """A deployment whose router escalates every step."""
    return House(settings={"prefix_cache_mib": 0})


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as running:
        yield running


def steps_of(events: Solution) -> list[tuple[str, int, list[int]]]:
    """Returns each step's text, its source and its flags, of a solution that came to its end."""
    assert events[-1].HasField("finished")
    return [
        (step.step.text, step.step.source, list(step.degradations)) for step in committed(events)
    ]


def steps(writer: str, *flags: int) -> list[tuple[str, int, list[int]]]:
    """Returns a whole solution by one model, with those flags on each step."""
    source = SOURCE_DRAFT if writer == "draft" else SOURCE_TARGET
    return [(f"{writer} {index}", source, list(flags)) for index in range(3)]


async def told(
    stub: orchestrator_pb2_grpc.OrchestratorServiceAsyncStub, request: pb.GenerateSolutionRequest
) -> tuple[grpc.StatusCode, str]:
    """Returns the code and the reason that a request is refused with."""
    error = await refusal(stub, request)
    assert isinstance(error.__cause__, grpc.aio.AioRpcError)
    return error.__cause__.code(), error.reason


async def test_a_target_replica_that_dies_mid_step_costs_nothing_but_time(house: House) -> None:
    engines = [FakeGeneratorEngine(write=numbered("target", 3)) for _ in range(2)]
    for engine in engines:
        engine.may_answer.clear()
    async with (
        serving(GENERATOR, GeneratorServicer(engines[0], 8)) as one,
        serving(GENERATOR, GeneratorServicer(engines[1], 8)) as other,
    ):
        house.settings["target_address"] = f"{one.address},{other.address}"
        async with house.open() as stub, asyncio.TaskGroup() as group:
            running = group.create_task(solution(stub, asking(arbitrage=ARBITRAGE)))
            await until(lambda: any(engine.call_count for engine in engines))
            dying, living = (0, 1) if engines[0].call_count else (1, 0)
            engines[living].may_answer.set()
            await (one, other)[dying].stop()
    assert steps_of(running.result()) == steps("target")
    assert engines[living].call_count == 3


async def test_without_any_target_the_draft_stands_flagged_or_the_call_is_unavailable(
    house: House,
) -> None:
    async with house.open() as stub:
        await house.servers["target"].stop()
        allowed = await solution(stub, asking(arbitrage=ARBITRAGE, allow_degraded=True))
        assert steps_of(allowed) == steps("draft", pb.DEGRADATION_TARGET_UNAVAILABLE)
        assert await told(stub, asking(arbitrage=ARBITRAGE)) == (UNAVAILABLE, "TARGET_UNAVAILABLE")


@pytest.mark.parametrize("fallback", ["accept_draft", "escalate", "fail"])
async def test_without_a_router_the_configured_fallback_decides_flagged(
    house: House, fallback: str
) -> None:
    house.settings["router_fallback"] = fallback
    request = asking(arbitrage=ARBITRAGE)
    async with house.open() as stub:
        await solution(stub, request)
        await house.servers["router"].stop()
        if fallback == "fail":
            assert await told(stub, request) == (UNAVAILABLE, "ROUTER_UNAVAILABLE")
            return
        writer = "draft" if fallback == "accept_draft" else "target"
        flagged = steps(writer, pb.DEGRADATION_ROUTER_UNAVAILABLE)
        assert steps_of(await solution(stub, request)) == flagged
        degraded = house.metric("arbitrage_steps_total", source=writer, degraded="true")
    assert degraded == 3


async def test_without_a_draft_the_target_writes_flagged(house: House) -> None:
    async with house.open() as stub:
        await house.servers["draft"].stop()
        events = await solution(stub, asking(arbitrage=ARBITRAGE))
    assert steps_of(events) == steps("target", pb.DEGRADATION_DRAFT_UNAVAILABLE)


async def test_without_a_prm_only_the_policies_that_ask_it_are_unavailable(house: House) -> None:
    async with house.open() as stub:
        await house.servers["prm"].stop()
        assert steps_of(await solution(stub, asking(arbitrage=ARBITRAGE))) == steps("target")
        for asked in (asking(rsd=pb.RsdPolicy()), asking(oracle=pb.OraclePolicy())):
            assert await told(stub, asked) == (UNAVAILABLE, "PRM_UNAVAILABLE")


async def test_without_redis_requests_go_on_uncached_and_resumable_ones_are_refused(
    redis: RedisServer,
) -> None:
    house = House(settings={"store_url": redis.url})
    async with house.open() as stub:
        assert steps_of(await solution(stub, asking(request_id="id-1"))) == steps("draft")
        await asyncio.to_thread(redis.kill)
        calls = house.draft.call_count
        assert steps_of(await solution(stub, asking())) == steps("draft")
        assert house.metric("arbitrage_store_up") == 0
        assert house.draft.call_count == calls + 3
        resumed = asking(request_id="id-1", resume_after_step=1)
        assert await told(stub, resumed) == (UNAVAILABLE, "SESSION_STORE_AWAY")


async def test_the_client_resumes_on_another_orchestrator_and_sees_nothing_but_time(
    redis: RedisServer, tmp_path: Path
) -> None:
    engine = FakeGeneratorEngine(write=numbered("draft", 3))
    settings = {
        "ARBITRAGE_STORE_URL": redis.url,
        "ARBITRAGE_PREFIX_CACHE_MIB": "0",
        "ARBITRAGE_SESSION_LEASE_S": "0.5",
    }
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    async with (
        orchestrator(folders[0], engine, **settings) as one,
        orchestrator(folders[1], engine, **settings) as other,
        AsyncArbitrageClient([one.address, other.address]) as client,
    ):
        found: list[tuple[int, str]] = []
        async for event in client.stream("1 + 1?", policy=DraftOnly()):
            if not isinstance(event, StepCommitted):
                continue
            found.append((event.step_index, event.step.text))
            assert not event.degradations
            if event.step_index == 0:
                engine.may_answer.clear()
                await until(lambda: engine.call_count == 2)
                one.process.kill()
                engine.may_answer.set()
    assert found == [(0, "draft 0"), (1, "draft 1"), (2, "draft 2")]


async def test_overload_is_refused_early_with_the_time_to_come_back(house: House) -> None:
    house.settings |= {"max_concurrency": 1, "max_queue": 1}
    house.target.may_answer.clear()
    async with house.open() as stub, asyncio.TaskGroup() as group:
        running = [group.create_task(solution(stub, asking(arbitrage=ARBITRAGE))) for _ in range(2)]
        await until(lambda: house.metric("arbitrage_solutions_waiting") == 1)
        error = await refusal(stub, asking(arbitrage=ARBITRAGE))
        house.target.may_answer.set()
    assert isinstance(error, Overloaded)
    assert error.retry_after_s > 0
    assert isinstance(error.__cause__, grpc.aio.AioRpcError)
    assert error.__cause__.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    for task in running:
        assert steps_of(task.result()) == steps("target")


async def test_overload_raises_the_threshold_within_the_callers_bounds_flagged(
    house: House,
) -> None:
    house.settings["target_step_capacity"] = 1
    house.target.may_answer.clear()
    async with house.open() as stub, asyncio.TaskGroup() as group:
        for problem in ("2 + 2?", "3 + 3?"):
            group.create_task(solution(stub, asking(problem=problem, arbitrage=ARBITRAGE)))
        await until(lambda: house.metric("arbitrage_target_inflight_steps") == 2)
        bounded = pb.ArbitragePolicy(max_escalation_threshold=0.75)
        events = await solution(stub, asking(arbitrage=bounded))
        house.target.may_answer.set()
    assert steps_of(events) == steps("draft", pb.DEGRADATION_LOAD_PRICED_THRESHOLD)
    assert {step.threshold for step in committed(events)} == {0.75}


async def test_an_orchestrator_told_to_stop_ends_its_request_first_and_exits_0(
    tmp_path: Path,
) -> None:
    engine = FakeGeneratorEngine()
    engine.may_answer.clear()
    async with (
        orchestrator(tmp_path, engine) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub: orchestrator_pb2_grpc.OrchestratorServiceAsyncStub
        stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
        events = aiter(stub.GenerateSolution(asking(stream_text=True), timeout=60))
        await anext(events)
        running.process.send_signal(signal.SIGTERM)
        await no_longer_serving(channel, ORCHESTRATOR.full_name)
        assert await told(stub, asking()) == (UNAVAILABLE, "NOT_SERVING")
        engine.may_answer.set()
        rest = [event async for event in events]
        code, written = await ended(running.process)
    assert len(steps_of(rest)) == 3
    assert code == 0, written
    assert "Traceback" not in written
    assert "1 + 1" not in written


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_target_told_to_stop_ends_its_steps_first_and_exits_0(tmp_path: Path) -> None:
    variables = {
        "ARBITRAGE_MODEL": "tiny",
        "ARBITRAGE_ROLE": "target",
        "ARBITRAGE_READY_FILE": str(tmp_path / "ready.json"),
    }
    async with started("services.generator", **variables) as process:
        found = await ready(process, tmp_path / "ready.json")
        async with grpc.aio.insecure_channel(found["address"]) as channel:
            stub: generator_pb2_grpc.GeneratorServiceAsyncStub
            stub = generator_pb2_grpc.GeneratorServiceStub(channel)
            request = generator_pb2.GenerateStepRequest(problem=PROBLEM, stream_text=True)
            calls = [aiter(stub.GenerateStep(request, timeout=60)) for _ in range(4)]
            for call in calls:
                assert (await anext(call)).text_delta
            process.send_signal(signal.SIGTERM)
            for call in calls:
                messages = [message async for message in call]
                assert messages[-1].result.token_count > 0
            code, written = await ended(process)
    assert code == 0, written
    assert "Traceback" not in written
    assert "Bob" not in written


async def no_longer_serving(channel: grpc.aio.Channel, service: str) -> None:
    """Returns once a server says that it does not serve."""
    health = health_pb2_grpc.HealthStub(channel)
    async for answer in health.Watch(health_pb2.HealthCheckRequest(service=service)):
        if answer.status == health_pb2.HealthCheckResponse.NOT_SERVING:
            return
