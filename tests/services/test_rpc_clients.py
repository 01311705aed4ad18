"""The core's ports over real gRPC: what comes through, and what each failure means."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import pytest

from arbitrage.core.calibration import CalibrationTable
from arbitrage.core.errors import (
    ContextTooLong,
    DeadlineExceeded,
    DraftUnavailable,
    Internal,
    NotServing,
    Overloaded,
    PrmUnavailable,
    RouterUnavailable,
    TargetUnavailable,
)
from arbitrage.core.ports import StepRequest
from arbitrage.core.steps import GeneratedStep, ModelIdentity, Source, Step, StopReason, Trajectory
from arbitrage.v1 import generator_pb2, router_pb2
from services.generator.servicer import GeneratorServicer
from services.prm.servicer import PrmServicer
from services.router.servicer import RouterServicer
from services.rpc.calls import CallLimits
from services.rpc.clients import (
    GrpcGenerator,
    GrpcRouter,
    GrpcScorer,
)
from services.rpc.handlers import Context
from services.rpc.pool import opened_pool
from services.rpc.server import Listener, RpcServer
from services.rpc.telemetry import Telemetry
from tests.services.fakes_engines import FakeGeneratorEngine, FakePrmEngine, FakeRouterEngine
from tests.services.running import GENERATOR, PRM, ROUTER, serving, until

TRAJECTORY = Trajectory("1 + 1?", (Step("one", Source.TARGET, StopReason.STEP_LENGTH),))
REQUEST = StepRequest(TRAJECTORY, max_tokens=8)
LIMITS = CallLimits()
NOBODY = "127.0.0.1:1"


@asynccontextmanager
async def generator_of(
    engine: FakeGeneratorEngine, limits: CallLimits = LIMITS
) -> AsyncIterator[GrpcGenerator]:
    """Serves an engine and hands over the port that reaches it."""
    async with (
        serving(GENERATOR, GeneratorServicer(engine, 256)) as server,
        opened_pool("target", server.address) as pool,
    ):
        yield GrpcGenerator(pool, TargetUnavailable, limits)


@asynccontextmanager
async def router_of(
    engine: FakeRouterEngine, limits: CallLimits = LIMITS
) -> AsyncIterator[GrpcRouter]:
    """Serves an engine and hands over the port that reaches it."""
    async with (
        serving(ROUTER, RouterServicer(engine)) as server,
        opened_pool("target", server.address) as pool,
    ):
        yield GrpcRouter(pool, limits)


async def items_of(generator: GrpcGenerator, request: StepRequest) -> list[str | GeneratedStep]:
    """Returns everything a step's stream yields."""
    return [item async for item in generator.generate_step(request)]


async def test_a_request_arrives_as_it_was_made_and_the_step_as_it_was_written() -> None:
    engine = FakeGeneratorEngine()
    request = StepRequest(TRAJECTORY, 8, entropy_token_count=2, time_limit_s=5.0)
    async with generator_of(engine) as generator:
        items = await items_of(generator, request)
    assert engine.requests == [request]
    assert items == [engine.write(request)]


async def test_text_comes_before_the_step_when_it_is_asked_for() -> None:
    async with generator_of(FakeGeneratorEngine()) as generator:
        items = await items_of(generator, StepRequest(TRAJECTORY, 8, stream_text=True))
    assert items[:-1] == ["step", "1"]
    assert isinstance(items[-1], GeneratedStep)


async def test_closing_a_step_cancels_the_engine() -> None:
    engine = FakeGeneratorEngine()
    engine.may_answer.clear()
    async with generator_of(engine) as generator:
        step = generator.generate_step(StepRequest(TRAJECTORY, 8, stream_text=True))
        async with aclosing(step) as items:
            await anext(items)
            await anext(items)
        await until(lambda: engine.cancelled_count)


@pytest.mark.parametrize("role", [DraftUnavailable, TargetUnavailable])
async def test_nobody_at_the_address_is_the_role_that_is_missing(
    role: type[DraftUnavailable | TargetUnavailable],
) -> None:
    async with opened_pool("target", NOBODY) as pool:
        generator = GrpcGenerator(pool, role)
        with pytest.raises(role):
            await items_of(generator, REQUEST)
        with pytest.raises(role):
            await generator.describe()


async def test_missing_judges_are_named_too() -> None:
    async with opened_pool("target", NOBODY) as pool:
        with pytest.raises(PrmUnavailable):
            await GrpcScorer(pool).score_step(TRAJECTORY, "two")
        with pytest.raises(RouterUnavailable):
            await GrpcRouter(pool).estimate_advantage(TRAJECTORY, "two")
        with pytest.raises(RouterUnavailable):
            await GrpcRouter(pool).describe()


async def test_a_model_that_is_stopping_counts_as_unavailable() -> None:
    async with generator_of(FakeGeneratorEngine(error=NotServing("closing"))) as generator:
        with pytest.raises(TargetUnavailable, match="closing"):
            await items_of(generator, REQUEST)


async def test_what_a_model_refuses_keeps_its_reason() -> None:
    error = ContextTooLong("prompt", 9, "is too long", "cut it")
    async with generator_of(FakeGeneratorEngine(error=error)) as generator:
        with pytest.raises(ContextTooLong) as raised:
            await items_of(generator, REQUEST)
        assert vars(raised.value) == vars(error)


@dataclass
class CrowdedGenerator(FakeGeneratorEngine):
    """Refuses the first calls for want of a place."""

    refusal: Overloaded = field(default_factory=lambda: Overloaded("full", 0.02))
    refusal_count: int = 0

    async def generate_step(
        self, request: StepRequest
    ) -> AsyncGenerator[str | GeneratedStep, None]:
        if len(self.requests) < self.refusal_count:
            self.requests.append(request)
            raise self.refusal
        async for item in super().generate_step(request):
            yield item


async def test_an_overloaded_model_is_asked_again_with_the_time_that_is_left() -> None:
    engine = CrowdedGenerator(refusal_count=2)
    async with generator_of(engine) as generator:
        items = await items_of(generator, StepRequest(TRAJECTORY, 8, time_limit_s=30.0))
    assert len(items) == 1
    limits_s = [request.time_limit_s or 0.0 for request in engine.requests]
    assert limits_s[0] == 30.0
    assert 0.0 < limits_s[2] < limits_s[1] < 30.0


async def test_a_model_that_stays_overloaded_is_unavailable_after_a_few_tries() -> None:
    engine = CrowdedGenerator(refusal_count=99)
    async with generator_of(engine) as generator:
        with pytest.raises(TargetUnavailable, match="full"):
            await items_of(generator, REQUEST)
    assert len(engine.requests) == 4


async def test_an_overloaded_model_is_not_waited_for_beyond_the_requests_time() -> None:
    engine = CrowdedGenerator(refusal_count=99, refusal=Overloaded("full", 600.0))
    async with generator_of(engine) as generator, asyncio.timeout(30):
        with pytest.raises(TargetUnavailable, match="full"):
            await items_of(generator, StepRequest(TRAJECTORY, 8, time_limit_s=60.0))
    assert len(engine.requests) == 1


async def test_an_overloaded_judge_is_unavailable_too() -> None:
    async with router_of(FakeRouterEngine(error=Overloaded("full", 0.01))) as router:
        with pytest.raises(RouterUnavailable, match="full"):
            await router.estimate_advantage(TRAJECTORY, "two")


class Mumbling(GeneratorServicer):
    """Sends what is no step."""

    def __init__(self, response: generator_pb2.GenerateStepResponse) -> None:
        super().__init__(FakeGeneratorEngine(), 256)
        self.response = response

    async def GenerateStep(  # noqa: N802 - the proto's name
        self, request: generator_pb2.GenerateStepRequest, context: Context
    ) -> AsyncGenerator[generator_pb2.GenerateStepResponse, None]:
        yield self.response


@pytest.mark.parametrize(
    "response",
    [
        generator_pb2.GenerateStepResponse(),
        generator_pb2.GenerateStepResponse(result=generator_pb2.GeneratedStep(text="a")),
    ],
)
async def test_an_answer_that_is_no_step_is_a_defect_of_its_role(
    response: generator_pb2.GenerateStepResponse,
) -> None:
    async with (
        serving(GENERATOR, Mumbling(response)) as server,
        opened_pool("target", server.address) as pool,
    ):
        with pytest.raises(Internal, match="target"):
            await items_of(GrpcGenerator(pool, TargetUnavailable), REQUEST)


async def test_a_defect_of_a_model_says_whose_it_is() -> None:
    async with generator_of(FakeGeneratorEngine(error=KeyError("x"))) as generator:
        with pytest.raises(Internal, match="target"):
            await items_of(generator, REQUEST)


async def test_a_call_ends_with_its_requests_time() -> None:
    engine = FakeGeneratorEngine()
    engine.may_answer.clear()
    async with generator_of(engine, CallLimits(timeout_s=60.0, grace_s=0.1)) as generator:
        with pytest.raises(DeadlineExceeded):
            await items_of(generator, StepRequest(TRAJECTORY, 8, time_limit_s=0.1))


async def test_a_model_that_hangs_beyond_any_calls_time_is_unavailable() -> None:
    engine = FakeGeneratorEngine()
    engine.may_answer.clear()
    async with generator_of(engine, CallLimits(timeout_s=0.2)) as generator:
        for limit_s in (None, 30.0):
            with pytest.raises(TargetUnavailable):
                await items_of(generator, StepRequest(TRAJECTORY, 8, time_limit_s=limit_s))


async def test_a_judges_call_ends_with_its_requests_time() -> None:
    engine = FakeRouterEngine()
    engine.may_answer.clear()
    async with router_of(engine) as router:
        with pytest.raises(DeadlineExceeded):
            await router.estimate_advantage(TRAJECTORY, "two", time.monotonic() + 0.2)


async def test_a_judge_asked_when_no_time_is_left_says_so() -> None:
    async with router_of(FakeRouterEngine()) as router:
        with pytest.raises(DeadlineExceeded):
            await router.estimate_advantage(TRAJECTORY, "two", time.monotonic() - 1.0)


class SilentRouter(RouterServicer):
    """Never says what it is."""

    def __init__(self) -> None:
        super().__init__(FakeRouterEngine())
        self.ask_count = 0

    async def GetRouter(  # noqa: N802 - the proto's name
        self, request: router_pb2.GetRouterRequest, context: Context
    ) -> router_pb2.GetRouterResponse:
        self.ask_count += 1
        await asyncio.Event().wait()
        raise AssertionError("nobody sets the event")


async def test_a_router_that_says_nothing_is_not_asked_again_at_once() -> None:
    servicer = SilentRouter()
    async with (
        serving(ROUTER, servicer) as server,
        opened_pool("target", server.address) as pool,
    ):
        router = GrpcRouter(pool, CallLimits(grace_s=0.1))
        for _ in range(3):
            with pytest.raises(RouterUnavailable):
                await router.describe()
    assert servicer.ask_count == 1


async def test_a_router_is_not_waited_for_beyond_the_requests_time() -> None:
    async with (
        serving(ROUTER, SilentRouter()) as server,
        opened_pool("target", server.address) as pool,
        asyncio.timeout(30),
    ):
        router = GrpcRouter(pool, CallLimits(grace_s=60.0))
        with pytest.raises(DeadlineExceeded):
            await router.describe(time.monotonic() + 0.1)


async def test_a_table_finer_than_a_float_arrives_as_it_is() -> None:
    table = CalibrationTable((0.99999999, 0.999999995), (0.5, 0.25))
    engine = FakeRouterEngine(calibration=table, default_threshold=0.999999995)
    async with router_of(engine) as router:
        assert await router.describe() == engine.description


async def test_scores_arrive_with_what_they_took() -> None:
    prm = FakePrmEngine(score=0.7)
    async with (
        serving(PRM, PrmServicer(prm)) as server,
        opened_pool("target", server.address) as pool,
    ):
        reward = await GrpcScorer(pool).score_step(TRAJECTORY, "two")
    assert (reward.value, reward.model) == (0.7, prm.identity)
    assert (reward.prefill_token_count, reward.cached_token_count) == (11, 5)
    async with router_of(FakeRouterEngine(score=0.3)) as router:
        advantage = await router.estimate_advantage(TRAJECTORY, "two")
    assert (advantage.value, advantage.prefill_token_count) == (0.3, 13)


async def test_a_router_is_described_again_only_when_another_answers() -> None:
    engine = FakeRouterEngine()
    async with router_of(engine) as router:
        first = await router.describe()
        assert first == engine.description
        engine.default_threshold = 0.9
        assert await router.describe() is first
        engine.identity = ModelIdentity("fake", "r2")
        await router.estimate_advantage(TRAJECTORY, "two")
        assert await router.describe() == engine.description


async def test_the_router_that_gave_a_score_is_found_among_those_of_an_update() -> None:
    old = FakeRouterEngine(identity=ModelIdentity("fake", "r1"), default_threshold=0.1)
    new = FakeRouterEngine(identity=ModelIdentity("fake", "r2"), default_threshold=0.9)
    async with (
        serving(ROUTER, RouterServicer(old)) as one,
        serving(ROUTER, RouterServicer(new)) as other,
        opened_pool("router", f"{one.address},{other.address}") as pool,
    ):
        router = GrpcRouter(pool)
        for engine in (old, new, old):
            assert await router.describe_model(engine.identity) == engine.description
        with pytest.raises(RouterUnavailable, match=r"r0.*has been replaced"):
            await router.describe_model(ModelIdentity("fake", "r0"))


class CountedRouter(RouterServicer):
    """Counts how often it is asked what it is."""

    ask_count = 0

    async def GetRouter(  # noqa: N802 - the proto's name
        self, request: router_pb2.GetRouterRequest, context: Context
    ) -> router_pb2.GetRouterResponse:
        self.ask_count += 1
        return await super().GetRouter(request, context)


async def test_routers_that_take_turns_are_asked_once_what_they_are() -> None:
    engine = FakeRouterEngine()
    servicer = CountedRouter(engine)
    async with serving(ROUTER, servicer) as server, opened_pool("router", server.address) as pool:
        router = GrpcRouter(pool)
        for revision in ("r1", "r2") * 4:
            engine.identity = ModelIdentity("fake", revision)
            score = await router.estimate_advantage(TRAJECTORY, "two")
            assert (await router.describe_model(score.model)).model == engine.identity
            assert (await router.describe()).model == engine.identity
    assert servicer.ask_count == 2


async def test_waiting_for_a_server_ends_when_it_serves() -> None:
    server = RpcServer(GENERATOR, Listener("127.0.0.1", 0), Telemetry())
    await server.start()
    async with opened_pool("target", server.address) as pool, asyncio.TaskGroup() as group:
        waiting = group.create_task(pool.wait_until_serving(GENERATOR.full_name))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await server.open(GeneratorServicer(FakeGeneratorEngine(), 8))
    await server.stop()


async def test_a_server_that_comes_back_is_found_again() -> None:
    engine = FakeGeneratorEngine()
    servicer = GeneratorServicer(engine, 8)
    async with serving(GENERATOR, servicer) as server:
        port = server.port
    async with opened_pool("target", server.address) as pool:
        generator = GrpcGenerator(pool, TargetUnavailable)
        with pytest.raises(TargetUnavailable):
            await items_of(generator, REQUEST)
        again = RpcServer(GENERATOR, Listener("127.0.0.1", port), Telemetry())
        await again.start()
        await again.open(servicer)
        async with asyncio.timeout(30):
            while True:
                try:
                    assert await items_of(generator, REQUEST)
                    break
                except TargetUnavailable:
                    await asyncio.sleep(0.05)
        await again.stop()
