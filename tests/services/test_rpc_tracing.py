"""Traces: one request is one trace through every program, and a collector can do no harm."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import grpc.aio
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from arbitrage.core.errors import ProblemEmpty, TargetUnavailable
from arbitrage.core.ports import StepRequest
from arbitrage.core.steps import GeneratedStep
from arbitrage.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from services.rpc.log_context import bound, fit
from services.rpc.otlp import traces_sent
from tests.services.collectors import Collector, KeptSpan, collecting
from tests.services.fakes_engines import FakeGeneratorEngine, numbered
from tests.services.running import House, asking, committed, refusal, solution, until

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = ("traceparent", f"00-{TRACE_ID}-{SPAN_ID}-01")
NOBODY = "http://127.0.0.1:1"


@asynccontextmanager
async def tracing_to(endpoint: str, sample_rate: float = 1.0) -> AsyncIterator[None]:
    """Sends traces while the block runs; then all of them are there."""
    with ExitStack() as stack:
        await asyncio.to_thread(
            lambda: stack.enter_context(traces_sent(endpoint, sample_rate, "house"))
        )
        try:
            yield
        finally:
            await asyncio.to_thread(stack.close)


@asynccontextmanager
async def traced_house(
    house: House,
) -> AsyncIterator[tuple[orchestrator_pb2_grpc.OrchestratorServiceAsyncStub, Collector]]:
    """Opens a house whose spans the collector has once the block is left."""
    with collecting() as collector:
        async with tracing_to(collector.url), house.open() as stub:
            yield stub, collector


async def traced_solution(
    stub: orchestrator_pb2_grpc.OrchestratorServiceAsyncStub,
    request: orchestrator_pb2.GenerateSolutionRequest,
    *metadata: tuple[str, str],
) -> list[orchestrator_pb2.GenerateSolutionResponse]:
    """Returns all events of a solution that is asked for within a trace."""
    call = stub.GenerateSolution(request, timeout=20, metadata=(TRACEPARENT, *metadata))
    return [event async for event in call]


def tree(spans: list[KeptSpan]) -> set[tuple[str, str]]:
    """Returns the names of spans, each with its parent's."""
    names = {kept.span.span_id: kept.span.name for kept in spans}
    return {(names.get(kept.span.parent_span_id, "client"), kept.span.name) for kept in spans}


async def test_a_request_is_one_trace_through_every_program() -> None:
    async with traced_house(House()) as (stub, collector):
        request = asking()
        request.arbitrage.escalation_threshold = 0.4
        events = await traced_solution(stub, request)
    spans = collector.of_trace(bytes.fromhex(TRACE_ID))
    assert len(committed(events)) == 3
    assert tree(spans) == {
        ("client", "GenerateSolution"),
        ("GenerateSolution", "draft GenerateStep"),
        ("GenerateSolution", "router EstimateAdvantage"),
        ("GenerateSolution", "target GenerateStep"),
        ("draft GenerateStep", "GenerateStep"),
        ("target GenerateStep", "GenerateStep"),
        ("router EstimateAdvantage", "EstimateAdvantage"),
    }
    (root,) = [kept for kept in spans if kept.span.name == "GenerateSolution"]
    assert root.span.parent_span_id == bytes.fromhex(SPAN_ID)
    assert {kept.span.kind for kept in spans if " " in kept.span.name} == {Span.SPAN_KIND_CLIENT}
    assert {kept.span.kind for kept in spans if " " not in kept.span.name} == {
        Span.SPAN_KIND_SERVER
    }


async def test_spans_say_who_wrote_what_for_whom() -> None:
    async with traced_house(House()) as (stub, collector):
        request = asking()
        request.arbitrage.escalation_threshold = 0.4
        await traced_solution(stub, request, ("x-arbitrage-request-id", "r-1"))
    spans = collector.of_trace(bytes.fromhex(TRACE_ID))
    (root,) = [kept for kept in spans if kept.span.name == "GenerateSolution"]
    assert (
        root.attributes.items()
        >= {
            "arbitrage.request_id": "r-1",
            "arbitrage.policy": "arbitrage",
            "arbitrage.code": "OK",
            "arbitrage.stop_reason": "end_of_sequence",
            "arbitrage.escalations": 3,
        }.items()
    )
    assert (
        root.events[1].items()
        >= {
            "arbitrage.step_index": 1,
            "arbitrage.source": "target",
            "arbitrage.escalated": True,
            "arbitrage.degraded": False,
            "arbitrage.token_count": 3,
            "arbitrage.model_revision": "r1",
        }.items()
    )
    asked = [kept for kept in spans if kept.span.name == "target GenerateStep"]
    assert [kept.attributes["arbitrage.step_index"] for kept in asked] == [0, 1, 2]
    assert (
        asked[0].attributes.items()
        >= {
            "arbitrage.role": "target",
            "arbitrage.request_id": "r-1",
            "arbitrage.policy": "arbitrage",
            "arbitrage.token_count": 3,
            "arbitrage.prefill_token_count": 7,
            "arbitrage.cached_token_count": 2,
            "arbitrage.model_revision": "r1",
        }.items()
    )


async def test_spans_hold_no_text_of_a_problem_or_a_step() -> None:
    house = House(draft=FakeGeneratorEngine(write=numbered("secretdraft", 2)))
    async with traced_house(house) as (stub, collector):
        await solution(stub, asking(problem="secretproblem?", stream_text=True))
        await refusal(stub, asking(problem="secretproblem?", budgets={"max_steps": -1}))
    sent = b"".join(kept.span.SerializeToString() for kept in collector.spans)
    assert b"GenerateSolution" in sent
    assert b"secretproblem" not in sent
    assert b"secretdraft 0" not in sent


async def test_a_failed_call_has_the_reason_as_its_status() -> None:
    house = House()
    async with traced_house(house) as (stub, collector):
        assert isinstance(await refusal(stub, asking(problem=" ")), ProblemEmpty)
        await house.servers["target"].stop()
        request = asking()
        request.target_only.SetInParent()
        assert isinstance(await refusal(stub, request), TargetUnavailable)
    failed = {
        (kept.span.name, kept.span.status.message)
        for kept in collector.spans
        if kept.span.status.code == Status.STATUS_CODE_ERROR
    }
    assert failed == {
        ("GenerateSolution", "PROBLEM_EMPTY"),
        ("GenerateSolution", "TARGET_UNAVAILABLE"),
        ("target GenerateStep", "TARGET_UNAVAILABLE"),
    }


async def test_a_question_nobody_waits_for_any_more_is_no_error() -> None:
    house = House()
    house.draft.may_answer.clear()
    async with traced_house(house) as (stub, collector):
        call = stub.GenerateSolution(asking(stream_text=True), metadata=(TRACEPARENT,))
        await anext(aiter(call))
        call.cancel()
        await until(lambda: house.draft.cancelled_count)
    spans = collector.of_trace(bytes.fromhex(TRACE_ID))
    (asked,) = [kept for kept in spans if kept.span.name == "draft GenerateStep"]
    assert asked.attributes["arbitrage.cancelled"] is True
    assert asked.span.status.code == Status.STATUS_CODE_UNSET


async def test_a_trace_that_its_caller_does_not_sample_is_not_sent() -> None:
    not_sampled = (TRACEPARENT[0], TRACEPARENT[1].removesuffix("01") + "00")
    async with traced_house(House()) as (stub, collector):
        async for _ in stub.GenerateSolution(asking(), timeout=20, metadata=(not_sampled,)):
            pass
    assert collector.of_trace(bytes.fromhex(TRACE_ID)) == []


async def test_a_share_of_none_sends_only_what_callers_sample() -> None:
    with collecting() as collector:
        async with tracing_to(collector.url, sample_rate=0.0), House().open() as stub:
            await solution(stub, asking())
            await traced_solution(stub, asking())
    assert collector.spans == collector.of_trace(bytes.fromhex(TRACE_ID)) != []


async def test_a_traceparent_that_cannot_be_read_begins_a_trace() -> None:
    async with traced_house(House()) as (stub, collector):
        odd = (("traceparent", "00-what-ever-01"),)
        async for _ in stub.GenerateSolution(asking(), timeout=20, metadata=odd):
            pass
    (root,) = [kept for kept in collector.spans if kept.span.name == "GenerateSolution"]
    assert root.span.parent_span_id == b""


async def test_a_collector_that_is_not_there_changes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with House().open() as stub:
        without = [event.WhichOneof("event") for event in await solution(stub, asking())]
    async with tracing_to(NOBODY), House().open() as stub:
        for _ in range(20):
            events = await solution(stub, asking())
            assert [event.WhichOneof("event") for event in events] == without
    told = [record for record in caplog.records if "opentelemetry" in record.name]
    assert told == []
    lost = [record for record in caplog.records if record.name == "services.rpc.otlp"]
    assert [record.levelname for record in lost] == ["WARNING"]


@pytest.mark.parametrize("sent", ["r-1", "odd id" + "\t" * 300])
async def test_models_know_the_id_of_the_request_they_work_for(sent: str) -> None:
    seen: list[object] = []
    write = numbered("draft", 3)

    def remembering(request: StepRequest) -> GeneratedStep:
        seen.append(bound()["request_id"])
        return write(request)

    house = House(draft=FakeGeneratorEngine(write=remembering))
    async with house.open() as stub:
        metadata = (("x-arbitrage-request-id", sent.replace("\t", " ")),)
        async for _ in stub.GenerateSolution(asking(), timeout=20, metadata=metadata):
            pass
        async for _ in stub.GenerateSolution(asking(problem="2 + 2?"), timeout=20):
            pass
    mine, others = seen[:3], seen[3:]
    assert set(mine) == {fit(sent)}
    assert len(set(others)) == 1
    assert not set(others) & set(mine)


async def test_each_call_has_a_context_of_its_own() -> None:
    async with House().open() as stub:
        assert "request_id" not in bound()
        await solution(stub, asking())
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in stub.GenerateSolution(asking(problem=" "), timeout=20):
                pass
        assert "request_id" not in bound()
