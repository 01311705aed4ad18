"""The services that run a model, over real gRPC: what their callers get and what is refused."""

from __future__ import annotations

from typing import Any

import grpc.aio
import pytest

from arbitrage.core.errors import (
    ArbitrageError,
    ContextTooLong,
    FieldInvalid,
    SamplingOutOfRange,
)
from arbitrage.status import from_rpc_error
from arbitrage.v1 import (
    generator_pb2,
    generator_pb2_grpc,
    prm_pb2,
    prm_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
)
from arbitrage.v1.trajectory_pb2 import SOURCE_TARGET, STOP_REASON_SEPARATOR, SamplingConfig, Step
from services.generator.servicer import GeneratorServicer
from services.prm.servicer import PrmServicer
from services.router.servicer import RouterServicer
from services.rpc.model_program import EngineMetrics, made_ready
from services.rpc.program import StartError
from services.rpc.telemetry import Telemetry
from tests.services.fakes_engines import (
    CALIBRATION,
    FakeGeneratorEngine,
    FakePrmEngine,
    FakeRouterEngine,
)
from tests.services.running import GENERATOR, PRM, ROUTER, serving

STEP = Step(text="one", source=SOURCE_TARGET, stop_reason=STOP_REASON_SEPARATOR)


async def error_of(call: Any) -> ArbitrageError:
    """Returns what a call fails with."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return from_rpc_error(raised.value)


async def test_a_generator_fills_in_its_own_token_bound() -> None:
    engine = FakeGeneratorEngine()
    async with (
        serving(GENERATOR, GeneratorServicer(engine, 99)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub: generator_pb2_grpc.GeneratorServiceAsyncStub
        stub = generator_pb2_grpc.GeneratorServiceStub(channel)
        request = generator_pb2.GenerateStepRequest(problem="p")
        messages = [message async for message in stub.GenerateStep(request)]
        described = await stub.GetGenerator(generator_pb2.GetGeneratorRequest())
    assert engine.requests[0].max_tokens == 99
    assert messages[-1].result.text == "step 0"
    assert (described.max_context_tokens, described.separator) == (4096, "\n\n")


async def test_a_generator_refuses_what_it_cannot_draw() -> None:
    async with (
        serving(GENERATOR, GeneratorServicer(FakeGeneratorEngine(), 99)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub: generator_pb2_grpc.GeneratorServiceAsyncStub
        stub = generator_pb2_grpc.GeneratorServiceStub(channel)
        request = generator_pb2.GenerateStepRequest(sampling=SamplingConfig(temperature=-1))
        assert isinstance(
            await error_of(anext(aiter(stub.GenerateStep(request)))), SamplingOutOfRange
        )


async def test_a_prm_scores_the_steps_after_the_skipped_ones() -> None:
    async with (
        serving(PRM, PrmServicer(FakePrmEngine(score=0.25))) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub: prm_pb2_grpc.PrmServiceAsyncStub = prm_pb2_grpc.PrmServiceStub(channel)
        steps = [STEP, STEP, STEP]
        answer = await stub.ScoreSteps(
            prm_pb2.ScoreStepsRequest(problem="p", steps=steps, skip_count=1)
        )
        assert list(answer.scores) == [0.25, 0.25]
        error = await error_of(
            stub.ScoreSteps(prm_pb2.ScoreStepsRequest(problem="p", steps=steps, skip_count=4))
        )
        described = await stub.GetPrm(prm_pb2.GetPrmRequest())
    assert isinstance(error, FieldInvalid)
    assert error.field == "skip_count"
    assert described.family == "fake"


async def test_a_router_tells_its_score_and_its_table() -> None:
    engine = FakeRouterEngine(score=0.75)
    async with (
        serving(ROUTER, RouterServicer(engine)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub: router_pb2_grpc.RouterServiceAsyncStub = router_pb2_grpc.RouterServiceStub(channel)
        answer = await stub.EstimateAdvantage(
            router_pb2.EstimateAdvantageRequest(problem="p", steps=[STEP], candidate="two")
        )
        described = await stub.GetRouter(router_pb2.GetRouterRequest())
    assert (answer.score, answer.truncated_token_count) == (0.75, 2)
    assert [point.threshold for point in described.calibration] == list(CALIBRATION.thresholds)
    assert described.annotated


def test_an_engines_counts_can_be_read() -> None:
    telemetry = Telemetry()
    telemetry.registry.register(EngineMetrics(FakeGeneratorEngine(), "draft"))
    sample = telemetry.registry.get_sample_value
    assert sample("arbitrage_engine_queued_requests", {"role": "draft"}) == 0
    decoded = {"role": "draft", "kind": "decoded"}
    assert sample("arbitrage_engine_tokens_total", decoded) == 0


class SmallEngine(FakeGeneratorEngine):
    """Has no room even for its first call."""

    async def warm_up(self) -> None:
        """Fails as an engine does whose cache is smaller than two tokens."""
        raise ContextTooLong("problem", "4 tokens", "does not fit", "shorten it")


async def test_a_model_that_cannot_answer_its_first_call_does_not_start() -> None:
    with pytest.raises(StartError, match=r"ARBITRAGE_MODEL: its first call failed: .*KV_CACHE_MIB"):
        await made_ready(SmallEngine())
