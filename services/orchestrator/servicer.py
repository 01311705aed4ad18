"""Answers OrchestratorService calls: checks, admits, and runs the loop."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Final
from uuid import uuid4

from arbitrage.core.errors import (
    ArbitrageError,
    DeadlineExceeded,
    FieldInvalid,
    SessionStoreUnavailable,
)
from arbitrage.core.events import Event, Finished, StepCommitted
from arbitrage.core.ledger import Ledger
from arbitrage.core.limits import Budgets
from arbitrage.core.policies import ArbitragePolicy
from arbitrage.core.ports import RouterDescription
from arbitrage.core.speculation import RouterFallback, SolutionRequest, generate_solution
from arbitrage.core.steps import ModelIdentity, Sampling, StopReason
from arbitrage.v1 import orchestrator_pb2, orchestrator_pb2_grpc, session_pb2
from arbitrage.wire import event_from_proto, ledger_from_proto
from services.orchestrator.admission import Admission
from services.orchestrator.events import (
    budgets_to_proto,
    caps_to_proto,
    event_to_proto,
    ledger_to_proto,
)
from services.orchestrator.feedback import Feedback
from services.orchestrator.load_price import LoadPricedPolicy, TargetPrice
from services.orchestrator.models import RemoteModels
from services.orchestrator.quotas import Quotas
from services.orchestrator.reporting import report
from services.orchestrator.requests import RequestRules
from services.orchestrator.sessions import Session, SessionName, Sessions
from services.orchestrator.telemetry import SolutionMetrics
from services.orchestrator.thresholds import settled_policy
from services.rpc.auth import Caller, check_policy, current_caller
from services.rpc.convert import identity_to_proto
from services.rpc.handlers import Context
from services.rpc.log_context import bind, bound

# Of the time that a call has, this much is kept for the last event's way to the caller, so that a
# solution without time ends with `Finished` rather than with the transport's DEADLINE_EXCEEDED.
_MARGIN_SHARE: Final = 0.05
_LONGEST_MARGIN_S: Final = 0.5
# gRPC sends a call's time in few digits, and rounds it up by this share at most.
_ROUNDED_SHARE: Final = 0.01


@dataclass(frozen=True, slots=True)
class Desk:
    """Everything a request is handled with."""

    rules: RequestRules
    admission: Admission
    quotas: Quotas
    models: RemoteModels
    metrics: SolutionMetrics
    router_fallback: RouterFallback
    price: TargetPrice
    feedback: Feedback | None = None
    sessions: Sessions | None = None


class OrchestratorServicer(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """Solves problems with the models at its desk."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def GenerateSolution(  # noqa: N802 - the proto's name
        self, request: orchestrator_pb2.GenerateSolutionRequest, context: Context
    ) -> AsyncGenerator[orchestrator_pb2.GenerateSolutionResponse, None]:
        """Yields the events of a solution. A caller that goes away ends its model calls."""
        desk, arrived_s = self._desk, time.monotonic()
        call_time_s, caller = context.time_remaining(), current_caller()
        request_id = request.request_id or str(bound().get("request_id", uuid4().hex))
        bind(
            request_id=request_id,
            tenant=caller.tenant,
            policy=request.WhichOneof("policy") or "",
            step_index=0,
        )
        session = _session(desk.sessions, request, caller)
        asked = desk.rules.asked(request)
        check_policy(str(request.WhichOneof("policy")))
        budgets = _within_the_call(asked.budgets, call_time_s, spent_s=0.0)
        # The caller's time runs from the call's arrival, the queue included.
        deadline_s = _moment(arrived_s, budgets)
        account = Account()
        # The store is asked only where the answer counts.
        if desk.quotas.apply_to(caller) and (session is None or not await session.is_known()):
            await desk.quotas.admit(caller)
            account.awaits_place = True
        async with AsyncExitStack() as stack:
            # Also where the caller leaves or a model fails: what was used was used. Before the
            # place, so that nobody waits for a place while this is written down.
            stack.push_async_callback(self._settle, caller, account)
            try:
                await stack.enter_async_context(
                    desk.admission.place(caller.tenant, deadline_s, caller.max_concurrency)
                )
                account.awaits_place = False
                if session is not None:
                    stack.push_async_callback(session.release)
                    records = session.follow(deadline_s)
                    await stack.enter_async_context(aclosing(records))
                    async for record in records:
                        if _is_news(record, request.resume_after_step):
                            yield _response(record)
                    if session.is_finished:
                        return
            except DeadlineExceeded:
                account.ledger.elapsed_s = time.monotonic() - arrived_s
                finished = Finished(StopReason.DEADLINE, account.ledger)
                report(finished)
                yield event_to_proto(finished)
                return
            account.take_up(session)
            spent_s = account.ledger.elapsed_s
            # Where this call followed another, most of what was spent was so since it arrived.
            started_s = min(arrived_s, time.monotonic() - spent_s)
            budgets = _within_the_call(asked.budgets, call_time_s, spent_s)
            deadline_s = _moment(started_s, budgets)
            is_bound_by_call = budgets != asked.budgets
            policy = await settled_policy(
                asked.policy, desk.models.router, desk.router_fallback, deadline_s
            )
            if asked.max_escalation_threshold is not None:
                policy = LoadPricedPolicy(policy, asked.max_escalation_threshold, desk.price)
            watched = None
            if desk.feedback is not None and policy.name == ArbitragePolicy.name:
                policy = watched = desk.feedback.of_solution(uuid4().hex, policy)
            solution = SolutionRequest(
                problem=asked.problem,
                policy=policy,
                budgets=budgets,
                sampling=_seeded(asked.sampling, session),
                allow_degraded=asked.allow_degraded,
                router_fallback=desk.router_fallback,
                stream_text=asked.stream_text,
            )
            models = desk.models.for_request(
                deadline_s, is_cacheable=asked.sampling.is_deterministic
            )
            stack.callback(desk.metrics.observe_ledger, account.ledger, account.before)
            events = generate_solution(
                solution,
                models,
                started_s=started_s,
                ledger=account.ledger,
                committed=account.steps,
            )
            await stack.enter_async_context(aclosing(events))
            async for event in events:
                response = event_to_proto(event)
                if session is not None and _is_lasting(event, is_bound_by_call=is_bound_by_call):
                    # A step that the caller has seen is a step that can be resumed.
                    await session.append(_record(response, account.ledger), deadline_s)
                desk.metrics.observe(event)
                report(event)
                if watched is not None:
                    watched.observe(event)
                yield response

    async def _settle(self, caller: Caller, account: Account) -> None:
        if account.awaits_place:
            await self._desk.quotas.give_back(caller)
        used_count = account.ledger.used_token_count - account.before.used_token_count
        await self._desk.quotas.charge(caller, used_count)

    async def GetCapabilities(  # noqa: N802 - the proto's name
        self, request: orchestrator_pb2.GetCapabilitiesRequest, context: Context
    ) -> orchestrator_pb2.GetCapabilitiesResponse:
        """Asks every model what it is, and tells that and the limits."""
        desk, models = self._desk, self._desk.models
        describes: dict[str, Callable[[], Awaitable[ModelIdentity | RouterDescription]]] = {
            **models.describes
        }
        if models.router is not None:
            describes["router"] = models.router.ask_description
        async with asyncio.TaskGroup() as group:
            answers = {
                role: group.create_task(_answer_of(describe))
                for role, describe in describes.items()
            }
        router = answers["router"].result() if "router" in answers else None
        return orchestrator_pb2.GetCapabilitiesResponse(
            models=[_role_model(role, answer.result()) for role, answer in answers.items()],
            policies=desk.rules.policies,
            max_problem_bytes=desk.rules.caps.max_problem_bytes,
            default_budgets=budgets_to_proto(desk.rules.default_budgets),
            budget_caps=caps_to_proto(desk.rules.caps),
            default_escalation_threshold=(
                router.default_threshold if isinstance(router, RouterDescription) else None
            ),
            resumable=desk.sessions is not None,
        )


@dataclass(slots=True)
class Account:
    """What a solution has cost, and what of it was there when this call took it up.

    `awaits_place` says that a quota has counted the call, and that no place was found so far.
    """

    ledger: Ledger = field(default_factory=Ledger)
    before: Ledger = field(default_factory=Ledger)
    steps: tuple[StepCommitted, ...] = ()
    awaits_place: bool = False

    def take_up(self, session: Session | None) -> None:
        """Goes on from a session's records, where there are any."""
        if session is None or not session.records:
            return
        events = [event_from_proto(_response(record)) for record in session.records]
        self.steps = tuple(event for event in events if isinstance(event, StepCommitted))
        self.ledger = ledger_from_proto(session.records[-1].ledger)
        self.before = deepcopy(self.ledger)


def _session(
    sessions: Sessions | None, request: orchestrator_pb2.GenerateSolutionRequest, caller: Caller
) -> Session | None:
    """Returns the session that a request names; None where it names none."""
    if not request.HasField("request_id"):
        if request.resume_after_step:
            raise FieldInvalid(
                "resume_after_step",
                request.resume_after_step,
                "needs a request_id",
                "send the request_id of the call to resume",
            )
        return None
    if sessions is None:
        raise SessionStoreUnavailable(
            "request_id: this deployment has no session store that orchestrators share; leave "
            "request_id out, or deploy one"
        )
    return sessions.session(SessionName.of(request, caller.tenant), request.resume_after_step)


def _within_the_call(budgets: Budgets, call_time_s: float | None, spent_s: float) -> Budgets:
    """Returns the budgets with their time within the call's, of which some is left to say so.

    What was spent before the call is none of its time.
    """
    if call_time_s is None:
        return budgets
    margin_s = min(_LONGEST_MARGIN_S, _MARGIN_SHARE * call_time_s)
    limit_s = spent_s + call_time_s * (1.0 - _ROUNDED_SHARE) - margin_s
    if budgets.time_limit_s is not None:
        limit_s = min(limit_s, budgets.time_limit_s)
    return replace(budgets, time_limit_s=limit_s)


def _moment(started_s: float, budgets: Budgets) -> float | None:
    """Returns the moment of the monotonic clock at which a request's time is over."""
    return None if budgets.time_limit_s is None else started_s + budgets.time_limit_s


def _seeded(sampling: Sampling, session: Session | None) -> Sampling:
    """Returns sampling that draws the same when a step is written again, here or elsewhere."""
    if sampling.is_deterministic:
        return sampling
    seed = secrets.randbits(56) if session is None else session.name.seed
    return replace(sampling, seed=seed)


def _record(
    response: orchestrator_pb2.GenerateSolutionResponse, ledger: Ledger
) -> session_pb2.SessionRecord:
    if response.HasField("finished"):
        return session_pb2.SessionRecord(
            finished=response.finished, ledger=response.finished.ledger
        )
    spent = ledger_to_proto(ledger)
    # The ledger learns the time only when the solution ends.
    spent.elapsed.CopyFrom(response.step_committed.elapsed)
    return session_pb2.SessionRecord(step_committed=response.step_committed, ledger=spent)


def _response(
    record: session_pb2.SessionRecord,
) -> orchestrator_pb2.GenerateSolutionResponse:
    if record.HasField("finished"):
        return orchestrator_pb2.GenerateSolutionResponse(finished=record.finished)
    return orchestrator_pb2.GenerateSolutionResponse(step_committed=record.step_committed)


def _is_lasting(event: Event, *, is_bound_by_call: bool) -> bool:
    """Whether a session keeps an event: a step, or the end, but not that of this call's time."""
    if isinstance(event, Finished):
        return event.stop_reason is not StopReason.DEADLINE or not is_bound_by_call
    return isinstance(event, StepCommitted)


def _is_news(record: session_pb2.SessionRecord, known_steps: int) -> bool:
    return record.HasField("finished") or record.step_committed.step_index >= known_steps


async def _answer_of(
    describe: Callable[[], Awaitable[ModelIdentity | RouterDescription]],
) -> ModelIdentity | RouterDescription | None:
    """Returns a model's answer; None where it gives none."""
    try:
        return await describe()
    except ArbitrageError:
        return None


def _role_model(
    role: str, answer: ModelIdentity | RouterDescription | None
) -> orchestrator_pb2.RoleModel:
    identity = answer.model if isinstance(answer, RouterDescription) else answer
    return orchestrator_pb2.RoleModel(
        role=role,
        model=None if identity is None else identity_to_proto(identity),
        available=identity is not None,
    )
