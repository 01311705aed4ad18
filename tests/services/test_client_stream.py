"""Both clients, over real gRPC, against a server whose words are known."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import closing, contextmanager

import grpc
import grpc.aio
import pytest

from arbitrage.client import (
    Arbitrage,
    ArbitrageClient,
    AsyncArbitrageClient,
    BudgetSpec,
    DraftOnly,
    TargetOnly,
)
from arbitrage.core.errors import (
    ArbitrageError,
    Cancelled,
    DeadlineExceeded,
    Internal,
    NotServing,
    Overloaded,
    TargetUnavailable,
    ThresholdOutOfRange,
)
from arbitrage.core.events import DraftProposed, Event, Finished, StepCommitted, TokenDelta
from arbitrage.core.limits import Budgets
from arbitrage.core.steps import Source, StopReason
from arbitrage.v1 import orchestrator_pb2 as api
from arbitrage.v1 import trajectory_pb2
from tests.services.scripted_orchestrator import (
    SOLUTION,
    Line,
    Refusal,
    ScriptedOrchestrator,
    Silence,
    draft_step,
    finished,
    proposed,
    serving,
    target_step,
)
from tests.services.wires import Wire

STOPPING = Refusal(grpc.StatusCode.UNAVAILABLE, "the server is stopping", "NOT_SERVING")


@pytest.fixture
def orchestrator() -> Iterator[ScriptedOrchestrator]:
    with serving(ScriptedOrchestrator(SOLUTION)) as scripted:
        yield scripted


@contextmanager
def talking_to(
    *scripts: Sequence[Line], retries: int = 2
) -> Iterator[tuple[ScriptedOrchestrator, ArbitrageClient]]:
    with (
        serving(ScriptedOrchestrator(*scripts)) as orchestrator,
        ArbitrageClient(orchestrator.address, retries=retries) as client,
    ):
        yield orchestrator, client


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_sync_stream_yields_core_events_with_finished_last(
    orchestrator: ScriptedOrchestrator,
) -> None:
    with ArbitrageClient(orchestrator.address) as client:
        events = list(client.stream("1 + 1?", policy=Arbitrage()))
    assert [type(event) for event in events] == [
        DraftProposed,
        StepCommitted,
        DraftProposed,
        StepCommitted,
        Finished,
    ]
    accepted, escalated = events[1], events[3]
    assert isinstance(accepted, StepCommitted)
    assert isinstance(escalated, StepCommitted)
    assert accepted.step.source is Source.DRAFT
    assert not accepted.escalated
    assert accepted.verdict is not None
    assert accepted.verdict.router_score is not None
    assert accepted.verdict.router_score.value == 0.25
    assert accepted.verdict.router_score.model.revision == "r1"
    assert accepted.verdict.draft_score is None
    assert accepted.draft_time_s == pytest.approx(0.02)
    assert escalated.escalated
    assert escalated.writer.model_id == "target"


async def failure_of(stream: AsyncGenerator[Event, None]) -> ArbitrageError:
    """Returns the error that the next event of a stream turns out to be."""
    with pytest.raises(ArbitrageError) as raised:
        await anext(stream)
    return raised.value


async def test_an_async_stream_yields_the_same_events_as_a_sync_one(
    orchestrator: ScriptedOrchestrator,
) -> None:
    async with AsyncArbitrageClient(orchestrator.address) as client:
        events = [event async for event in client.stream("1 + 1?", policy=Arbitrage())]

    def sync_events() -> list[object]:
        with ArbitrageClient(orchestrator.address) as sync_client:
            return list(sync_client.stream("1 + 1?", policy=Arbitrage()))

    assert events == await asyncio.to_thread(sync_events)


async def test_solve_returns_text_steps_and_cost(orchestrator: ScriptedOrchestrator) -> None:
    async with AsyncArbitrageClient(orchestrator.address) as client:
        solution = await client.solve("1 + 1?")
    assert solution.text == "14 + 8 = 22.\n\nThe answer is \\boxed{22}."
    assert len(solution.steps) == 2
    assert solution.stop_reason is StopReason.END_OF_SEQUENCE
    assert solution.escalation_rate == 0.5
    assert solution.ledger.draft.decoded_count == 10
    assert solution.ledger.target.call_count == solution.ledger.escalation_count == 1


def test_a_target_step_without_a_draft_was_never_judged() -> None:
    alone = target_step(0, "The answer is \\boxed{22}.")
    alone.step_committed.escalated = False
    with talking_to((alone, finished())) as (_, client):
        (step,) = client.solve("1 + 1?", policy=TargetOnly()).steps
    assert step.verdict is None
    assert not step.escalated


def test_a_step_cut_by_its_cap_is_continued_without_a_gap() -> None:
    cut = draft_step(0, "14 + ")
    cut.step_committed.step.stop_reason = trajectory_pb2.STOP_REASON_STEP_LENGTH
    script = (cut, draft_step(1, "8 = 22."), finished())
    with talking_to(script) as (_orchestrator, client):
        assert client.solve("1 + 1?").text == "14 + 8 = 22."


def test_the_server_is_sent_what_the_caller_said(orchestrator: ScriptedOrchestrator) -> None:
    with ArbitrageClient(orchestrator.address) as client:
        client.solve(
            "1 + 1?", policy=DraftOnly(), budgets=BudgetSpec(max_steps=3), allow_degraded=True
        )
    (request,) = orchestrator.requests
    assert request.WhichOneof("policy") == "draft_only"
    assert request.budgets.max_steps == 3
    assert request.allow_degraded


def test_a_refusal_is_raised_as_the_class_of_its_reason() -> None:
    refusal = Refusal(
        grpc.StatusCode.INVALID_ARGUMENT,
        "arbitrage.escalation_threshold: must be between 0 and 1, got 1.5; give one",
        "THRESHOLD_OUT_OF_RANGE",
        {"field": "arbitrage.escalation_threshold", "value": "1.5", "fix": "give one"},
    )
    with (
        talking_to((refusal,)) as (orchestrator, client),
        pytest.raises(ThresholdOutOfRange) as caught,
    ):
        client.solve("1 + 1?", policy=Arbitrage(escalation_threshold=1.5))
    assert caught.value.field == "arbitrage.escalation_threshold"
    assert len(orchestrator.requests) == 1


async def test_a_call_that_found_nobody_is_made_again() -> None:
    with serving(ScriptedOrchestrator((STOPPING,), (STOPPING,), SOLUTION)) as orchestrator:
        async with AsyncArbitrageClient(orchestrator.address, retries=2) as client:
            solution = await client.solve("1 + 1?")
    assert len(solution.steps) == 2
    assert len(orchestrator.requests) == 3


def test_a_sync_call_that_found_nobody_is_made_again() -> None:
    with talking_to((STOPPING,), SOLUTION, retries=1) as (orchestrator, client):
        assert len(client.solve("1 + 1?").steps) == 2
    assert len(orchestrator.requests) == 2


def test_retries_come_to_an_end() -> None:
    with talking_to((STOPPING,), retries=1) as (orchestrator, client), pytest.raises(NotServing):
        client.solve("1 + 1?")
    assert len(orchestrator.requests) == 2


NO_SESSIONS = Refusal(
    grpc.StatusCode.FAILED_PRECONDITION, "no session store", "SESSION_STORE_UNAVAILABLE"
)
LOST = Refusal(grpc.StatusCode.UNAVAILABLE, "no target answered", "TARGET_UNAVAILABLE")


def test_without_sessions_a_call_is_not_made_again_after_its_first_event() -> None:
    script = (proposed(0, "14 + 8 = 22."), LOST)
    with talking_to((NO_SESSIONS,), script, SOLUTION) as (orchestrator, client):
        stream = client.stream("p")
        next(stream)
        with pytest.raises(TargetUnavailable):
            next(stream)
        asked = [request.HasField("request_id") for request in orchestrator.requests]
        assert asked == [True, False]
        # What it has learnt of the deployment, it remembers.
        client.solve("p")
        assert not orchestrator.requests[-1].HasField("request_id")


def test_while_the_session_store_is_away_calls_go_on_without_an_id_that_nobody_gave() -> None:
    away = Refusal(grpc.StatusCode.UNAVAILABLE, "Redis is away", "SESSION_STORE_AWAY")
    with talking_to((away,), SOLUTION, SOLUTION) as (orchestrator, client):
        client.solve("p")
        # It may be back.
        client.solve("p")
    asked = [request.HasField("request_id") for request in orchestrator.requests]
    assert asked == [True, False, True]


def test_a_stream_that_breaks_is_resumed_after_the_steps_that_came() -> None:
    first: list[Line] = [*SOLUTION[:3], LOST]
    with talking_to(first, SOLUTION[2:]) as (orchestrator, client):
        events = list(client.stream("p"))
    assert [type(event) for event in events] == [
        DraftProposed,
        StepCommitted,
        DraftProposed,
        StepCommitted,
        Finished,
    ]
    begun, resumed = orchestrator.requests
    assert resumed.resume_after_step == 1
    assert resumed.request_id == begun.request_id != ""


def test_text_that_was_streamed_is_not_streamed_again() -> None:
    def delta(text: str) -> api.GenerateSolutionResponse:
        return api.GenerateSolutionResponse(
            token_delta=api.TokenDelta(source=trajectory_pb2.SOURCE_DRAFT, text=text)
        )

    first = (delta("14 "), delta("+ 8"), LOST)
    again = (delta("14 + "), delta("8 = 22."), *SOLUTION)
    with talking_to(first, again) as (_, client):
        events = list(client.stream("p", stream_text=True))
    texts = [event.text for event in events if isinstance(event, TokenDelta)]
    assert texts == ["14 ", "+ 8", " = 22."]


def test_text_that_comes_otherwise_the_second_time_is_not_put_behind_the_first() -> None:
    def delta(text: str) -> api.GenerateSolutionResponse:
        return api.GenerateSolutionResponse(
            token_delta=api.TokenDelta(source=trajectory_pb2.SOURCE_DRAFT, text=text)
        )

    first = (delta("14 "), delta("+ 8"), LOST)
    again = (delta("So, "), delta("8 and 14 make 22."), *SOLUTION)
    with talking_to(first, again) as (_, client):
        events = list(client.stream("p", stream_text=True))
    assert [event.text for event in events if isinstance(event, TokenDelta)] == ["14 ", "+ 8"]


def test_a_step_is_asked_for_again_once() -> None:
    broken: list[Line] = [*SOLUTION[:3], LOST]
    with talking_to(broken, (SOLUTION[2], LOST), SOLUTION[2:]) as (orchestrator, client):
        stream = client.stream("p")
        with pytest.raises(TargetUnavailable):
            list(stream)
    assert len(orchestrator.requests) == 2


@pytest.mark.slow
async def test_an_orchestrator_whose_host_vanishes_is_missed_long_before_the_call_is_over() -> None:
    with serving(ScriptedOrchestrator((*SOLUTION[:2], Silence()))) as silent:
        port = int(silent.address.rpartition(":")[2])
        async with (
            Wire(port).laid() as wire,
            AsyncArbitrageClient(wire.address, retries=0) as client,
            asyncio.timeout(60),
        ):
            stream = client.stream("p", timeout_s=600.0)
            await anext(stream)
            await anext(stream)
            wire.cut()
            with pytest.raises(NotServing):
                await anext(stream)


def test_a_stream_is_resumed_at_the_next_address() -> None:
    with (
        serving(ScriptedOrchestrator((*SOLUTION[:2], LOST))) as one,
        serving(ScriptedOrchestrator(SOLUTION[2:], SOLUTION)) as other,
        ArbitrageClient([one.address, other.address]) as client,
    ):
        solution = client.solve("p")
        assert len(solution.steps) == 2
        assert other.requests[0].resume_after_step == 1
        # The one that answered last is asked first.
        list(client.stream("p"))
    assert len(one.requests) == 1


def test_a_step_that_comes_out_of_order_is_a_defect_of_the_server() -> None:
    with talking_to((SOLUTION[3], finished())) as (_, client), pytest.raises(Internal) as raised:
        client.solve("p")
    assert "step 1 where 0 was next" in str(raised.value)


def test_an_overloaded_server_is_not_asked_again() -> None:
    full = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", "OVERLOADED")
    with talking_to((full,), SOLUTION) as (orchestrator, client), pytest.raises(Overloaded):
        client.solve("1 + 1?")
    assert len(orchestrator.requests) == 1


async def test_an_address_where_nobody_listens_is_named() -> None:
    address = f"127.0.0.1:{free_port()}"
    async with AsyncArbitrageClient(address, retries=1) as client:
        with pytest.raises(NotServing, match=address):
            await client.solve("1 + 1?")
        with pytest.raises(NotServing, match=address):
            await client.capabilities()


@pytest.mark.parametrize("script", [(Silence(),), (proposed(0, "14"), Silence())])
async def test_a_call_ends_at_its_deadline(script: tuple[Silence, ...]) -> None:
    with serving(ScriptedOrchestrator(script)) as orchestrator:
        async with AsyncArbitrageClient(orchestrator.address) as client:
            started = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                await client.solve("1 + 1?", timeout_s=0.3)
    assert time.monotonic() - started < 5


async def test_closing_a_stream_cancels_the_request() -> None:
    with serving(ScriptedOrchestrator((proposed(0, "14"), Silence()))) as orchestrator:
        async with AsyncArbitrageClient(orchestrator.address) as client:
            stream = client.stream("1 + 1?")
            await anext(stream)
            assert not orchestrator.cancelled.is_set()
            await stream.aclose()
            assert await asyncio.to_thread(orchestrator.cancelled.wait, 5)


async def test_closing_an_async_client_ends_its_streams_with_cancelled() -> None:
    with serving(ScriptedOrchestrator((proposed(0, "14"), Silence()))) as orchestrator:
        client = AsyncArbitrageClient(orchestrator.address)
        stream = client.stream("1 + 1?")
        await anext(stream)
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            reading = group.create_task(failure_of(stream))
            await asyncio.sleep(0)
            await client.close()
        assert isinstance(reading.result(), Cancelled)


async def test_a_task_that_is_cancelled_while_it_reads_a_stream_stays_cancelled() -> None:
    with serving(ScriptedOrchestrator((proposed(0, "14"), Silence()))) as orchestrator:
        async with AsyncArbitrageClient(orchestrator.address) as client:
            stream = client.stream("1 + 1?")
            await anext(stream)
            reading = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading


def test_closing_a_sync_stream_cancels_the_request() -> None:
    with talking_to((proposed(0, "14"), Silence())) as (orchestrator, client):
        stream = client.stream("1 + 1?")
        next(stream)
        stream.close()
        assert orchestrator.cancelled.wait(5)


@pytest.mark.parametrize(
    "script",
    [
        (proposed(0, "14"),),
        (finished(), proposed(0, "14")),
        (api.GenerateSolutionResponse(),),
    ],
)
def test_a_stream_that_breaks_the_contract_is_an_error(
    script: tuple[api.GenerateSolutionResponse, ...],
) -> None:
    with talking_to(script) as (_orchestrator, client), pytest.raises(Internal):
        list(client.stream("1 + 1?"))


def test_capabilities_are_told_as_core_values() -> None:
    scripted = ScriptedOrchestrator(SOLUTION)
    scripted.capabilities = api.GetCapabilitiesResponse(
        policies=["arbitrage", "draft_only"],
        max_problem_bytes=1000,
        default_budgets=api.Budgets(max_steps=8, max_tokens=100, max_step_tokens=20),
        default_escalation_threshold=0.4,
    )
    with serving(scripted) as orchestrator, ArbitrageClient(orchestrator.address) as client:
        told = client.capabilities()
    assert told.policies == ("arbitrage", "draft_only")
    assert told.default_budgets == Budgets(max_steps=8, max_tokens=100, max_step_tokens=20)
    assert told.caps.max_problem_bytes == 1000
    assert told.default_escalation_threshold == pytest.approx(0.4)


def test_every_error_of_the_client_is_of_the_one_tree(orchestrator: ScriptedOrchestrator) -> None:
    with ArbitrageClient(orchestrator.address) as client, pytest.raises(ArbitrageError):
        client.solve("a\ud800b")
    assert orchestrator.requests == []
