"""Answers OrchestratorService calls: checks, admits, and runs the loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from typing import Final
from uuid import uuid4

from arbitrage.core.errors import (
    ArbitrageError,
    DeadlineExceeded,
    FieldInvalid,
    SessionStoreUnavailable,
)
from arbitrage.core.events import Finished
from arbitrage.core.ledger import Ledger
from arbitrage.core.limits import Budgets
from arbitrage.core.policies import ArbitragePolicy
from arbitrage.core.ports import RouterDescription
from arbitrage.core.speculation import RouterFallback, SolutionRequest, generate_solution
from arbitrage.core.steps import ModelIdentity, StopReason
from arbitrage.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from services.orchestrator.admission import Admission
from services.orchestrator.events import budgets_to_proto, caps_to_proto, event_to_proto
from services.orchestrator.feedback import Feedback
from services.orchestrator.load_price import LoadPricedPolicy, TargetPrice
from services.orchestrator.models import RemoteModels
from services.orchestrator.quotas import Quotas
from services.orchestrator.requests import RequestRules
from services.orchestrator.telemetry import SolutionMetrics
from services.orchestrator.thresholds import settled_policy
from services.rpc.auth import Caller, current_caller
from services.rpc.convert import identity_to_proto
from services.rpc.handlers import Context

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


class OrchestratorServicer(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """Solves problems with the models at its desk."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def GenerateSolution(  # noqa: N802 - the proto's name
        self, request: orchestrator_pb2.GenerateSolutionRequest, context: Context
    ) -> AsyncGenerator[orchestrator_pb2.GenerateSolutionResponse, None]:
        """Yields the events of a solution. A caller that goes away ends its model calls."""
        desk, arrived_s = self._desk, time.monotonic()
        _check_session(request)
        asked = desk.rules.asked(request)
        budgets = _within_the_call(asked.budgets, context.time_remaining())
        deadline_s = None
        if budgets.time_limit_s is not None:
            # The caller's time runs from the call's arrival, the queue included.
            deadline_s = arrived_s + budgets.time_limit_s
        caller, ledger = current_caller(), Ledger()
        await desk.quotas.admit(caller)
        async with AsyncExitStack() as stack:
            # Also where the caller leaves or a model fails: what was used was used. Before the
            # place, so that nobody waits for a place while this is written down.
            stack.push_async_callback(self._charge, caller, ledger)
            try:
                await stack.enter_async_context(
                    desk.admission.place(caller.tenant, deadline_s, caller.max_concurrency)
                )
            except DeadlineExceeded:
                ledger.elapsed_s = time.monotonic() - arrived_s
                yield event_to_proto(Finished(StopReason.DEADLINE, ledger))
                return
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
                sampling=asked.sampling,
                allow_degraded=asked.allow_degraded,
                router_fallback=desk.router_fallback,
                stream_text=asked.stream_text,
            )
            models = desk.models.for_request(deadline_s)
            stack.callback(desk.metrics.observe_ledger, ledger)
            events = generate_solution(solution, models, started_s=arrived_s, ledger=ledger)
            await stack.enter_async_context(aclosing(events))
            async for event in events:
                desk.metrics.observe(event)
                if watched is not None:
                    watched.observe(event)
                yield event_to_proto(event)

    async def _charge(self, caller: Caller, ledger: Ledger) -> None:
        await self._desk.quotas.charge(caller, ledger.used_token_count)

    async def GetCapabilities(  # noqa: N802 - the proto's name
        self, request: orchestrator_pb2.GetCapabilitiesRequest, context: Context
    ) -> orchestrator_pb2.GetCapabilitiesResponse:
        """Asks every model what it is, and tells that and the limits."""
        desk, models = self._desk, self._desk.models
        describes: dict[str, Callable[[], Awaitable[ModelIdentity | RouterDescription]]] = {
            "draft": models.draft.describe,
            "target": models.target.describe,
        }
        if models.prm is not None:
            describes["prm"] = models.prm.describe
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
        )


def _within_the_call(budgets: Budgets, call_time_s: float | None) -> Budgets:
    """Returns the budgets with their time within the call's, of which some is left to say so."""
    if call_time_s is None:
        return budgets
    margin_s = min(_LONGEST_MARGIN_S, _MARGIN_SHARE * call_time_s)
    limit_s = call_time_s * (1.0 - _ROUNDED_SHARE) - margin_s
    if budgets.time_limit_s is not None:
        limit_s = min(limit_s, budgets.time_limit_s)
    return replace(budgets, time_limit_s=limit_s)


def _check_session(request: orchestrator_pb2.GenerateSolutionRequest) -> None:
    if not request.HasField("request_id"):
        if request.resume_after_step:
            raise FieldInvalid(
                "resume_after_step",
                request.resume_after_step,
                "needs a request_id",
                "send the request_id of the call to resume",
            )
    else:
        raise SessionStoreUnavailable(
            "request_id: this deployment has no session store that orchestrators share; leave "
            "request_id out, or deploy one"
        )


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
