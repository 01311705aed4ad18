"""A real gRPC orchestrator that says what a test tells it to. No models, no mocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event as Flag

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from arbitrage.v1 import orchestrator_pb2 as api
from arbitrage.v1 import orchestrator_pb2_grpc, trajectory_pb2

DRAFT = trajectory_pb2.ModelIdentity(model_id="draft", revision="d1")
TARGET = trajectory_pb2.ModelIdentity(model_id="target", revision="t1")
ROUTER = trajectory_pb2.ModelIdentity(model_id="router", revision="r1")


@dataclass(frozen=True)
class Refusal:
    """Ends a call with a status that carries `reason`, or none at all."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)

    def abort(self, context: grpc.ServicerContext) -> None:
        """Ends the call."""
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        if self.reason:
            detail = AnyMessage()
            detail.Pack(
                error_details_pb2.ErrorInfo(
                    reason=self.reason, domain="arbitrage.v1", metadata=self.metadata
                )
            )
            status.details.append(detail)
        context.abort_with_status(rpc_status.to_status(status))


@dataclass(frozen=True)
class Silence:
    """Says nothing until the call is over."""


Line = api.GenerateSolutionResponse | Refusal | Silence


class ScriptedOrchestrator(orchestrator_pb2_grpc.OrchestratorServiceServicer):
    """Answers each call with the next script; the last one serves all that follow."""

    def __init__(self, *scripts: Sequence[Line]) -> None:
        self.requests: list[api.GenerateSolutionRequest] = []
        self.metadata: list[tuple[str, str | bytes]] = []
        self.cancelled = Flag()
        self.address = ""
        self.capabilities = api.GetCapabilitiesResponse()
        self._scripts = list(scripts)

    def GenerateSolution(  # noqa: N802 — gRPC's name
        self, request: api.GenerateSolutionRequest, context: grpc.ServicerContext
    ) -> Iterator[api.GenerateSolutionResponse]:
        """Plays the script."""
        self.requests.append(request)
        self.metadata += [(key, value) for key, value in context.invocation_metadata()]
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        context.add_callback(self.cancelled.set)
        for line in script:
            match line:
                case Refusal():
                    line.abort(context)
                case Silence():
                    self.cancelled.wait(30)
                case _:
                    yield line

    def GetCapabilities(  # noqa: N802 — gRPC's name
        self, request: api.GetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> api.GetCapabilitiesResponse:
        """Tells what the test set."""
        return self.capabilities


@contextmanager
def serving(orchestrator: ScriptedOrchestrator) -> Iterator[ScriptedOrchestrator]:
    """Serves on a free port for as long as the block runs."""
    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    orchestrator_pb2_grpc.add_OrchestratorServiceServicer_to_server(orchestrator, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    orchestrator.address = f"127.0.0.1:{port}"
    try:
        yield orchestrator
    finally:
        orchestrator.cancelled.set()
        server.stop(None).wait()


def proposed(step_index: int, text: str) -> api.GenerateSolutionResponse:
    """Returns a draft's proposal."""
    return api.GenerateSolutionResponse(
        draft_proposed=api.DraftProposed(step_index=step_index, text=text, token_count=5)
    )


def draft_step(
    step_index: int, text: str, router_score: float = 0.25
) -> api.GenerateSolutionResponse:
    """Returns an accepted draft step."""
    return api.GenerateSolutionResponse(
        step_committed=api.StepCommitted(
            step_index=step_index,
            step=trajectory_pb2.Step(
                text=text,
                source=trajectory_pb2.SOURCE_DRAFT,
                stop_reason=trajectory_pb2.STOP_REASON_SEPARATOR,
            ),
            token_count=5,
            router_score=router_score,
            threshold=0.5,
            router=ROUTER,
            writer=DRAFT,
            draft_time=Duration(nanos=20_000_000),
            decision_time=Duration(nanos=4_000_000),
            elapsed=Duration(nanos=24_000_000),
        )
    )


def target_step(step_index: int, text: str) -> api.GenerateSolutionResponse:
    """Returns a target step that threw a draft step away and ends the solution."""
    return api.GenerateSolutionResponse(
        step_committed=api.StepCommitted(
            step_index=step_index,
            step=trajectory_pb2.Step(
                text=text,
                source=trajectory_pb2.SOURCE_TARGET,
                stop_reason=trajectory_pb2.STOP_REASON_END_OF_SEQUENCE,
            ),
            token_count=7,
            router_score=0.75,
            threshold=0.5,
            router=ROUTER,
            writer=TARGET,
            escalated=True,
            target_time=Duration(nanos=60_000_000),
            elapsed=Duration(nanos=110_000_000),
        )
    )


def finished() -> api.GenerateSolutionResponse:
    """Returns the end of a solution of one draft and one target step."""
    return api.GenerateSolutionResponse(
        finished=api.Finished(
            stop_reason=trajectory_pb2.STOP_REASON_END_OF_SEQUENCE,
            escalation_rate=0.5,
            ledger=api.Ledger(
                draft=api.TokenLedger(kept_count=5, discarded_count=5, call_count=2),
                target=api.TokenLedger(kept_count=7, call_count=1),
                router=api.TokenLedger(prefill_count=40, call_count=2),
                step_count=2,
                routed_step_count=2,
                escalation_count=1,
                elapsed=Duration(nanos=120_000_000),
            ),
        )
    )


SOLUTION: tuple[api.GenerateSolutionResponse, ...] = (
    proposed(0, "14 + 8 = 22."),
    draft_step(0, "14 + 8 = 22."),
    proposed(1, "The answer is 21."),
    target_step(1, "The answer is \\boxed{22}."),
    finished(),
)
