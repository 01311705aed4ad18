"""Answers OrchestratorService calls: checks, admits, and runs the loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from uuid import uuid4

from arbitrage.core.errors import (
    ArbitrageError,
    DeadlineExceeded,
    FieldInvalid,
    SessionStoreUnavailable,
)
from arbitrage.core.events import Finished
from arbitrage.core.ledger import Ledger
from arbitrage.core.policies import ArbitragePolicy
from arbitrage.core.ports import RouterDescription
from arbitrage.core.speculation import RouterFallback, SolutionRequest, generate_solution
from arbitrage.core.steps import ModelIdentity, StopReason
from arbitrage.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from services.orchestrator.admission import Admission
from services.orchestrator.events import budgets_to_proto, caps_to_proto, event_to_proto
from services.orchestrator.feedback import Feedback
from services.orchestrator.models import RemoteModels
from services.orchestrator.reporting import report
from services.orchestrator.requests import RequestRules
from services.orchestrator.telemetry import SolutionMetrics
from services.orchestrator.thresholds import settled_policy
from services.rpc.convert import identity_to_proto
from services.rpc.handlers import Context
from services.rpc.log_context import bind, bound


@dataclass(frozen=True, slots=True)
class Desk:
    """Everything a request is handled with."""

    rules: RequestRules
    admission: Admission
    models: RemoteModels
    metrics: SolutionMetrics
    router_fallback: RouterFallback
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
        request_id = request.request_id or str(bound().get("request_id", uuid4().hex))
        bind(request_id=request_id, policy=request.WhichOneof("policy") or "", step_index=0)
        _check_session(request)
        asked = desk.rules.asked(request)
        deadline_s = None
        if asked.budgets.time_limit_s is not None:
            # The caller's time runs from the call's arrival, the queue included.
            deadline_s = arrived_s + asked.budgets.time_limit_s
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(desk.admission.place(deadline_s))
            except DeadlineExceeded:
                ledger = Ledger(elapsed_s=time.monotonic() - arrived_s)
                finished = Finished(StopReason.DEADLINE, ledger)
                report(finished)
                yield event_to_proto(finished)
                return
            policy = await settled_policy(
                asked.policy, desk.models.router, desk.router_fallback, deadline_s
            )
            watched = None
            if desk.feedback is not None and policy.name == ArbitragePolicy.name:
                policy = watched = desk.feedback.of_solution(uuid4().hex, policy)
            solution = SolutionRequest(
                problem=asked.problem,
                policy=policy,
                budgets=asked.budgets,
                sampling=asked.sampling,
                allow_degraded=asked.allow_degraded,
                router_fallback=desk.router_fallback,
                stream_text=asked.stream_text,
            )
            models, ledger = desk.models.for_request(deadline_s), Ledger()
            # Also where the caller leaves or a model fails: what was computed was computed.
            stack.callback(desk.metrics.observe_ledger, ledger)
            events = generate_solution(solution, models, started_s=arrived_s, ledger=ledger)
            await stack.enter_async_context(aclosing(events))
            async for event in events:
                desk.metrics.observe(event)
                report(event)
                if watched is not None:
                    watched.observe(event)
                yield event_to_proto(event)

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
