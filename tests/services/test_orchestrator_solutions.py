"""Solutions through a whole deployment over real gRPC, with engines that say what a test wants."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration

from arbitrage.core.calibration import CalibrationTable
from arbitrage.core.errors import (
    CalibrationUnavailable,
    DraftUnavailable,
    FieldInvalid,
    MalformedMessage,
    Overloaded,
    PolicyUnknown,
    ProblemTooLarge,
    RouterUnavailable,
    SessionStoreUnavailable,
    TargetUnavailable,
)
from arbitrage.core.ports import StepRequest
from arbitrage.core.steps import GeneratedStep, ModelIdentity
from arbitrage.status import from_rpc_error
from arbitrage.v1 import generator_pb2
from arbitrage.v1 import orchestrator_pb2 as pb
from arbitrage.v1.trajectory_pb2 import (
    SOURCE_DRAFT,
    SOURCE_TARGET,
    STOP_REASON_DEADLINE,
    STOP_REASON_END_OF_SEQUENCE,
)
from services.generator.servicer import GeneratorServicer
from services.orchestrator.__main__ import build
from services.orchestrator.settings import OrchestratorSettings
from services.rpc.handlers import Context
from services.rpc.program import StartError
from services.rpc.telemetry import Telemetry
from tests.services.fakes_engines import FakeGeneratorEngine
from tests.services.running import (
    GENERATOR,
    House,
    Solution,
    asking,
    bytes_stream,
    committed,
    refusal,
    serving,
    solution,
    until,
)

ARBITRAGE = pb.ArbitragePolicy()


def kinds(events: Solution) -> list[str | None]:
    """Returns what each event is."""
    return [event.WhichOneof("event") for event in events]


@pytest.fixture
def house() -> House:
    return House()


async def test_a_stream_tells_each_step_with_its_provenance_and_ends_with_the_ledger(
    house: House,
) -> None:
    house.router.score = 0.3
    async with house.open() as stub:
        events = await solution(stub, asking(arbitrage=ARBITRAGE))
    assert kinds(events) == ["draft_proposed", "step_committed"] * 3 + ["finished"]
    step = committed(events)[1]
    assert (step.step_index, step.step.text, step.step.source) == (1, "draft 1", SOURCE_DRAFT)
    assert (step.router_score, step.threshold) == pytest.approx((0.3, 0.4))
    assert (step.router.model_id, step.writer.model_id) == ("router", "draft")
    assert (step.escalated, step.token_count) == (False, 3)
    assert not step.HasField("draft_score")
    finished = events[-1].finished
    assert finished.stop_reason == STOP_REASON_END_OF_SEQUENCE
    assert finished.ledger.draft.kept_count == 9
    assert (finished.ledger.step_count, finished.ledger.routed_step_count) == (3, 3)
    assert (finished.ledger.target.call_count, house.target.call_count) == (0, 0)


async def test_a_rejected_draft_is_written_by_the_target(house: House) -> None:
    house.router.score = 0.5
    async with house.open() as stub:
        events = await solution(stub, asking(arbitrage=ARBITRAGE))
        assert all(step.escalated for step in committed(events))
        assert [step.step.source for step in committed(events)] == [SOURCE_TARGET] * 3
        assert events[-1].finished.escalation_rate == 1.0
        assert house.metric("arbitrage_escalations_total") == 3
        assert house.metric("arbitrage_steps_total", source="target", degraded="false") == 3
        assert house.metric("arbitrage_tokens_total", role="target", outcome="kept") == 9
        assert house.metric("arbitrage_tokens_total", role="draft", outcome="discarded") == 9
        assert house.metric("arbitrage_target_inflight_steps") == 0


async def test_a_target_share_becomes_the_threshold_of_the_routers_table(house: House) -> None:
    async with house.open() as stub:
        policy = pb.ArbitragePolicy(target_share=0.25)
        events = await solution(stub, asking(arbitrage=policy))
    assert committed(events)[0].threshold == 0.75


async def test_a_target_share_without_a_table_is_refused(house: House) -> None:
    house.router.calibration = CalibrationTable((), ())
    async with house.open() as stub:
        policy = pb.ArbitragePolicy(target_share=0.25)
        error = await refusal(stub, asking(arbitrage=policy))
    assert isinstance(error, CalibrationUnavailable)


async def test_every_policy_runs_over_the_wire(house: House) -> None:
    async with house.open() as stub:
        names = (await stub.GetCapabilities(pb.GetCapabilitiesRequest())).policies
        assert len(names) == 7
        for name in names:
            request = pb.GenerateSolutionRequest(problem="p")
            getattr(request, name).SetInParent()
            events = await solution(stub, request)
            assert kinds(events)[-1] == "finished", name
            assert kinds(events).count("finished") == 1
            assert len(committed(events)) == 3


async def test_text_is_streamed_when_it_is_asked_for(house: House) -> None:
    async with house.open() as stub:
        for _ in ("asked", "cached"):
            events = await solution(stub, asking(stream_text=True))
            first = [event.token_delta for event in events if event.HasField("token_delta")][0:2]
            assert "".join(delta.text for delta in first).startswith("draft")
            assert first[0].source == SOURCE_DRAFT


async def test_a_caller_that_goes_away_stops_the_model(house: House) -> None:
    house.draft.may_answer.clear()
    async with house.open() as stub:
        call = stub.GenerateSolution(asking(stream_text=True))
        await anext(aiter(call))
        call.cancel()
        await until(lambda: house.draft.cancelled_count)
        await until(lambda: house.metric("arbitrage_solutions_running") == 0)


async def test_a_callers_deadline_stops_the_model(house: House) -> None:
    house.draft.may_answer.clear()
    async with house.open() as stub:
        call = stub.GenerateSolution(asking(stream_text=True), timeout=1.0)
        with pytest.raises(Exception, match="DEADLINE_EXCEEDED"):
            _ = [event async for event in call]
        await until(lambda: house.draft.cancelled_count)


async def test_a_time_limit_ends_the_solution_and_not_the_call(house: House) -> None:
    house.draft.may_answer.clear()
    house.settings["call_grace_s"] = 0.05
    async with house.open() as stub:
        limit = pb.Budgets(time_limit=Duration(nanos=200_000_000))
        events = await solution(stub, asking(budgets=limit))
    assert kinds(events) == ["finished"]
    assert events[-1].finished.stop_reason == STOP_REASON_DEADLINE


async def test_a_judge_that_hangs_does_not_outlast_the_time_limit(house: House) -> None:
    house.router.may_answer.clear()
    async with house.open() as stub:
        limit = pb.Budgets(time_limit=Duration(seconds=1))
        events = await solution(stub, asking(arbitrage=ARBITRAGE, budgets=limit))
    assert events[-1].finished.stop_reason == STOP_REASON_DEADLINE


async def test_a_router_that_was_never_there_can_be_a_failure(house: House) -> None:
    house.settings |= {"router_fallback": "fail", "router_address": "127.0.0.1:1"}
    async with house.open() as stub:
        error = await refusal(stub, asking(arbitrage=ARBITRAGE))
    assert isinstance(error, RouterUnavailable)


async def test_a_router_that_was_never_there_is_flagged_otherwise(house: House) -> None:
    house.settings |= {"router_fallback": "escalate", "router_address": "127.0.0.1:1"}
    async with house.open() as stub:
        steps = committed(await solution(stub, asking(arbitrage=ARBITRAGE)))
    assert [step.step.source for step in steps] == [SOURCE_TARGET] * 3
    assert list(steps[0].degradations) == [pb.DEGRADATION_ROUTER_UNAVAILABLE]


async def test_a_draft_that_is_gone_is_named(house: House) -> None:
    async with house.open() as stub:
        await house.servers["draft"].stop()
        assert isinstance(await refusal(stub, asking()), DraftUnavailable)


async def test_a_request_id_is_refused_without_a_shared_store(house: House) -> None:
    async with house.open() as stub:
        assert isinstance(await refusal(stub, asking(request_id="a")), SessionStoreUnavailable)
        error = await refusal(stub, asking(resume_after_step=1))
    assert isinstance(error, FieldInvalid)
    assert error.field == "resume_after_step"


async def test_a_large_problem_is_refused_by_its_name_and_not_by_grpc(house: House) -> None:
    async with house.open() as stub:
        error = await refusal(stub, asking(problem="x" * 10_000_000))
        assert isinstance(error, ProblemTooLarge)
        error = await refusal(stub, asking(problem="x" * 20_000_000))
    assert "ARBITRAGE_MAX_MESSAGE_MIB" in str(error)


async def test_text_that_is_not_utf8_is_refused_by_its_name(house: House) -> None:
    good = asking(problem="*****").SerializeToString()
    async with house.open(), grpc.aio.insecure_channel(house.address) as channel:
        call = bytes_stream(channel, "/arbitrage.v1.OrchestratorService/GenerateSolution")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await anext(aiter(call(good.replace(b"*****", b"ok\xffno"))))
    error = from_rpc_error(raised.value)
    assert isinstance(error, MalformedMessage)
    assert error.field == "problem"


async def test_time_spent_waiting_for_a_place_counts(house: House) -> None:
    house.settings |= {"max_concurrency": 1}
    house.draft.may_answer.clear()
    limit = pb.Budgets(time_limit=Duration(nanos=100_000_000))
    async with house.open() as stub, asyncio.TaskGroup() as group:
        first = group.create_task(solution(stub, asking()))
        await until(lambda: house.draft.call_count)
        late = group.create_task(solution(stub, asking(problem="late", budgets=limit)))
        await until(lambda: house.metric("arbitrage_solutions_waiting") == 1)
        await asyncio.sleep(0.2)
        house.draft.may_answer.set()
        assert kinds(await first)[-1] == "finished"
        assert (await late)[-1].finished.stop_reason == STOP_REASON_DEADLINE
    assert "late" not in {request.trajectory.problem for request in house.draft.requests}


async def test_a_request_whose_time_is_over_in_the_queue_ends_there(house: House) -> None:
    house.settings |= {"max_concurrency": 1}
    house.draft.may_answer.clear()
    limit = pb.Budgets(time_limit=Duration(nanos=100_000_000))
    async with house.open() as stub, asyncio.TaskGroup() as group:
        first = group.create_task(solution(stub, asking()))
        await until(lambda: house.draft.call_count)
        # The place is taken for as long as this test wants.
        late = await solution(stub, asking(problem="late", budgets=limit))
        house.draft.may_answer.set()
        assert kinds(await first)[-1] == "finished"
    assert kinds(late) == ["finished"]
    assert late[0].finished.stop_reason == STOP_REASON_DEADLINE
    assert late[0].finished.ledger.elapsed.ToMilliseconds() >= 100


async def test_what_a_cancelled_or_failed_request_took_is_counted(house: House) -> None:
    house.router.may_answer.clear()
    async with house.open() as stub:
        call = stub.GenerateSolution(asking(arbitrage=pb.ArbitragePolicy(escalation_threshold=0.4)))
        await anext(aiter(call))
        await until(lambda: house.router.call_count)
        call.cancel()
        await until(lambda: house.metric("arbitrage_solutions_running") == 0)
        assert house.metric("arbitrage_tokens_total", role="draft", outcome="cancelled") == 3
        assert house.metric("arbitrage_tokens_total", role="draft", outcome="prefilled") == 7
        house.router.may_answer.set()
        await house.servers["target"].stop()
        error = await refusal(stub, asking(problem="another", arbitrage=ARBITRAGE))
        assert isinstance(error, TargetUnavailable)
        assert house.metric("arbitrage_tokens_total", role="draft", outcome="cancelled") == 6
        assert house.metric("arbitrage_tokens_total", role="router", outcome="prefilled") == 13


async def test_a_full_target_does_not_fail_a_request_that_may_go_on_without_it(
    house: House,
) -> None:
    house.target.error = Overloaded("full", 0.01)
    async with house.open() as stub:
        request = asking(arbitrage=ARBITRAGE, allow_degraded=True)
        steps = committed(await solution(stub, request))
    assert [list(step.degradations) for step in steps] == [[pb.DEGRADATION_TARGET_UNAVAILABLE]] * 3


async def test_tokens_that_a_router_could_not_read_are_counted(house: House) -> None:
    async with house.open() as stub:
        assert house.metric("arbitrage_router_truncated_tokens_total") == 0
        await solution(stub, asking(arbitrage=ARBITRAGE))
        assert house.metric("arbitrage_router_truncated_tokens_total") == 6


class OtherSeparator(GeneratorServicer):
    """Ends its steps with a single line break."""

    async def GetGenerator(  # noqa: N802 - the proto's name
        self, request: generator_pb2.GetGeneratorRequest, context: Context
    ) -> generator_pb2.GetGeneratorResponse:
        return generator_pb2.GetGeneratorResponse(separator="\n")


async def test_generators_that_end_their_steps_differently_are_not_put_together() -> None:
    engine = FakeGeneratorEngine()
    async with (
        serving(GENERATOR, GeneratorServicer(engine, 8)) as draft,
        serving(GENERATOR, OtherSeparator(engine, 8)) as target,
    ):
        addresses: dict[str, Any] = {
            "draft_address": draft.address,
            "target_address": target.address,
        }
        settings = OrchestratorSettings(**addresses)
        with pytest.raises(StartError, match="ends its steps") as raised:
            async with build(settings, Telemetry()):
                raise AssertionError("it started")
    assert draft.address in str(raised.value)
    assert target.address in str(raised.value)


async def test_equal_requests_at_the_same_time_share_their_model_calls(house: House) -> None:
    house.draft.may_answer.clear()
    async with house.open() as stub, asyncio.TaskGroup() as group:
        tasks = [group.create_task(solution(stub, asking())) for _ in range(8)]
        await until(lambda: house.metric("arbitrage_solutions_running") == 8)
        house.draft.may_answer.set()
        texts = {
            tuple(step.step.text for step in committed(events))
            for events in [await task for task in tasks]
        }
        calls = house.draft.call_count
    assert len(texts) == 1
    assert calls == 3


async def test_a_cached_answer_computed_nothing(house: House) -> None:
    async with house.open() as stub:
        first = (await solution(stub, asking()))[-1].finished.ledger.draft
        again = (await solution(stub, asking()))[-1].finished.ledger.draft
    assert (first.prefill_count, first.cached_count) == (21, 6)
    assert (again.prefill_count, again.cached_count) == (0, 27)
    assert house.draft.call_count == 3


async def test_capabilities_tell_models_policies_and_limits(house: House) -> None:
    async with house.open() as stub:
        told = await stub.GetCapabilities(pb.GetCapabilitiesRequest())
        assert {(model.role, model.available) for model in told.models} == {
            (role, True) for role in ("draft", "target", "prm", "router")
        }
        assert told.default_escalation_threshold == pytest.approx(0.4)
        assert (told.default_budgets.max_steps, told.budget_caps.max_steps) == (32, 256)
        assert (told.max_problem_bytes, told.resumable) == (262_144, False)
        await house.servers["router"].stop()
        told = await stub.GetCapabilities(pb.GetCapabilitiesRequest())
    assert not next(model for model in told.models if model.role == "router").available
    assert not told.HasField("default_escalation_threshold")


async def test_policies_without_their_model_are_not_offered(house: House) -> None:
    house.settings |= {"prm_address": None, "router_address": None}
    async with house.open() as stub:
        told = await stub.GetCapabilities(pb.GetCapabilitiesRequest())
        error = await refusal(stub, asking(arbitrage=ARBITRAGE))
    assert set(told.policies) == {"random", "draft_only", "target_only", "first_token_entropy"}
    assert isinstance(error, PolicyUnknown)


async def test_every_metric_is_there_at_zero_from_the_start(house: House) -> None:
    async with house.open():
        for name, labels in (
            ("arbitrage_steps_total", {"source": "draft", "degraded": "true"}),
            ("arbitrage_escalations_total", {}),
            ("arbitrage_phase_seconds_count", {"phase": "decision"}),
            ("arbitrage_tokens_total", {"role": "target", "outcome": "discarded"}),
            ("arbitrage_prefix_cache_requests_total", {"role": "router", "result": "hit"}),
            ("arbitrage_target_inflight_steps", {}),
            ("arbitrage_target_demand_seconds", {}),
            ("arbitrage_solutions_waiting", {}),
        ):
            assert house.metric(name, **labels) == 0, name


async def test_a_step_is_held_against_the_threshold_of_the_router_that_scored_it(
    house: House,
) -> None:
    house.router.score = 0.5
    write = house.draft.write

    def replacing(request: StepRequest) -> GeneratedStep:
        if len(request.trajectory.steps) == 1:
            # Between two steps another router begins to serve, as after a promotion.
            house.router.identity = ModelIdentity("router", "r2")
            house.router.default_threshold = 0.8
        return write(request)

    house.draft.write = replacing
    async with house.open() as stub:
        first = committed(await solution(stub, asking(arbitrage=ARBITRAGE)))
        again = committed(await solution(stub, asking(arbitrage=ARBITRAGE)))
    assert [step.router.revision for step in first] == ["r1", "r2", "r2"]
    assert [step.threshold for step in first] == pytest.approx([0.4, 0.8, 0.8])
    assert [step.escalated for step in first] == [True, False, False]
    # What the old router said of the first step lies in the prefix cache and is not read again.
    assert [step.router.revision for step in again] == ["r2"] * 3
    assert [step.escalated for step in again] == [False] * 3


async def test_a_router_without_a_table_that_comes_in_the_middle_flags_and_does_not_fail(
    house: House,
) -> None:
    write = house.draft.write

    def replacing(request: StepRequest) -> GeneratedStep:
        if len(request.trajectory.steps) == 1:
            house.router.identity = ModelIdentity("router", "r2")
            house.router.calibration = CalibrationTable((), ())
        return write(request)

    house.draft.write = replacing
    async with house.open() as stub:
        policy = pb.ArbitragePolicy(target_share=0.25)
        steps = committed(await solution(stub, asking(arbitrage=policy)))
    assert [bool(step.degradations) for step in steps] == [False, True, True]
