"""What servers may send, to client and orchestrator: only `ArbitrageError` comes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from prometheus_client import CollectorRegistry

from arbitrage.core.errors import ArbitrageError, DraftUnavailable, RouterUnavailable
from arbitrage.core.steps import Score
from arbitrage.status import DETAILS_KEY, DOMAIN, from_rpc_error, to_status
from arbitrage.v1 import generator_pb2, orchestrator_pb2, prm_pb2, router_pb2
from arbitrage.v1.error_reason_pb2 import ErrorReason
from arbitrage.v1.trajectory_pb2 import (
    SOURCE_DRAFT,
    SOURCE_TARGET,
    STOP_REASON_SEPARATOR,
    STOP_REASON_STEP_LENGTH,
)
from arbitrage.wire import capabilities_from_proto, event_from_proto
from services.cli.render import StepLines, event_as_json
from services.orchestrator.telemetry import FeedbackMetrics
from services.rpc import convert
from services.rpc.calls import ModelCall
from services.rpc.pool import Pool
from tests.load.driver import ACCEPTED, Boundary, Wrong, legible
from tests.load.odd_values import OddValues


def answers() -> list[Boundary]:
    """Returns the boundaries."""
    return [
        Boundary("server events", 10, _event, _read_event),
        Boundary("server capabilities", 3, _capabilities, _read_capabilities),
        Boundary("server statuses", 12, _status, _read_status),
        Boundary("model answers", 10, _answer, _read_answer),
        Boundary("converted messages", 10, _core_message, _convert),
    ]


def _event(odd: OddValues) -> orchestrator_pb2.GenerateSolutionResponse:
    return odd.message(orchestrator_pb2.GenerateSolutionResponse)


def _read_event(message: orchestrator_pb2.GenerateSolutionResponse) -> str:
    try:
        event = event_from_proto(message)
    except ArbitrageError as error:
        legible(str(error))
        return error.reason
    for line in StepLines().lines(event):
        str(line)
    json.loads(event_as_json(event))
    return ACCEPTED


def _capabilities(odd: OddValues) -> orchestrator_pb2.GetCapabilitiesResponse:
    return odd.message(orchestrator_pb2.GetCapabilitiesResponse)


def _read_capabilities(message: orchestrator_pb2.GetCapabilitiesResponse) -> str:
    try:
        capabilities_from_proto(message)
    except ArbitrageError as error:
        return error.reason
    return ACCEPTED


class FailedCall(grpc.RpcError):
    """A call that ended with what a server may send."""

    def __init__(self, code: grpc.StatusCode, details: str | None, metadata: Any) -> None:
        self._code, self._details, self._metadata = code, details, metadata

    def __repr__(self) -> str:
        return f"FailedCall({self._code}, {self._details!r}, {self._metadata!r})"

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._metadata


def _status(odd: OddValues) -> FailedCall:
    code = odd.one_of(list(grpc.StatusCode))
    details = odd.one_of((None, odd.text(), "Received message larger than max (2 vs. 1)"))
    status = odd.message(status_pb2.Status)
    if odd.chance(0.8):
        status.code = code.value[0]
    for _ in range(odd.coin.randint(0, 3)):
        kinds = (error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo, status_pb2.Status)
        detail = _error_info(odd) if odd.chance(0.6) else odd.message(odd.one_of(kinds[1:]))
        status.details.add().Pack(detail)
    received = status.SerializeToString()
    if odd.chance(0.2):
        received = odd.changed_bytes(received)
    metadata = [(DETAILS_KEY, received), (odd.text(), odd.text())]
    return FailedCall(code, details, odd.one_of((None, (), metadata, metadata, metadata)))


def _error_info(odd: OddValues) -> Any:
    reasons = [name.removeprefix("ERROR_REASON_") for name in ErrorReason.keys()]  # noqa: SIM118 - no dict
    return error_details_pb2.ErrorInfo(
        reason=odd.one_of((odd.text(), *reasons)),
        domain=odd.one_of((DOMAIN, DOMAIN, DOMAIN, odd.text())),
        metadata={
            odd.one_of(("field", "value", "problem", "fix", odd.text())): odd.text()
            for _ in range(odd.coin.randint(0, 5))
        },
    )


def _read_status(call: FailedCall) -> str:
    error = from_rpc_error(call, DraftUnavailable)
    if not isinstance(error, ArbitrageError):
        raise Wrong(f"a status became {type(error).__name__}")
    # An orchestrator sends on what a model told it.
    to_status(error).SerializeToString()
    return error.reason


_ANSWERS: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (generator_pb2.GeneratedStep, convert.generated_step_from_proto),
    (router_pb2.EstimateAdvantageResponse, convert.advantage_from_proto),
    (prm_pb2.ScoreStepsResponse, convert.reward_from_proto),
    (router_pb2.GetRouterResponse, convert.router_from_proto),
)


_GOOD_ROUTER = router_pb2.GetRouterResponse(
    default_threshold=0.4,
    calibration=[
        router_pb2.CalibrationPoint(threshold=x / 4, target_share=1 - x / 4) for x in (1, 2, 3)
    ],
    annotated=True,
    score_rule="softmax",
)


# An answer is read without anybody being asked.
_NOWHERE = Pool("router", "nowhere:1")


def _answer(odd: OddValues) -> tuple[int, Any]:
    index = odd.coin.randrange(len(_ANSWERS))
    kind = _ANSWERS[index][0]
    if kind is router_pb2.GetRouterResponse and odd.chance(0.7):
        return index, odd.changed_message(_GOOD_ROUTER)
    return index, odd.message(kind)


def _read_answer(given: tuple[int, Any]) -> str:
    index, message = given
    try:
        value = ModelCall(_NOWHERE, b"", RouterUnavailable, 1.0).answer(_ANSWERS[index][1], message)
    except ArbitrageError as error:
        legible(str(error))
        return error.reason
    if isinstance(message, router_pb2.GetRouterResponse):
        # What the orchestrator does with a description as long as that router answers.
        for share in (0.0, 0.3, 1.0):
            if not 0.0 <= value.calibration.threshold_for(share) <= 1.0:
                raise Wrong(f"the table gives no threshold for {share}")
        metrics = FeedbackMetrics(CollectorRegistry(), lambda token_count: None)
        metrics.observe(Score(0.3, value.model), 0.1, value)
    return ACCEPTED


_CONVERSIONS: tuple[tuple[Any, Callable[[Any], Any], Callable[[Any], Any]], ...] = (
    (
        generator_pb2.GenerateStepRequest,
        lambda message: convert.step_request_from_proto(message, 7),
        convert.step_request_to_proto,
    ),
    (
        generator_pb2.GeneratedStep,
        convert.generated_step_from_proto,
        convert.generated_step_to_proto,
    ),
    (router_pb2.GetRouterResponse, convert.router_from_proto, convert.router_to_proto),
)


def _core_message(odd: OddValues) -> tuple[int, Any]:
    index = odd.coin.randrange(len(_CONVERSIONS))
    message = odd.message(_CONVERSIONS[index][0])
    if isinstance(message, generator_pb2.GenerateStepRequest):
        # Most draws are refused for these; what comes after them is to be tried too.
        message.sampling.temperature = odd.coin.random()
        message.sampling.top_p = odd.coin.random()
        message.time_limit.nanos = odd.coin.randrange(10**9)
        message.time_limit.seconds = odd.coin.randrange(86_400)
        del message.steps[3:]
        for step in message.steps:
            step.source = odd.one_of((SOURCE_DRAFT, SOURCE_TARGET))
            step.stop_reason = odd.one_of((STOP_REASON_SEPARATOR, STOP_REASON_STEP_LENGTH))
    elif isinstance(message, router_pb2.GetRouterResponse):
        message = odd.changed_message(_GOOD_ROUTER)
    return index, message


def _convert(given: tuple[int, Any]) -> str:
    index, message = given
    _, from_proto, to_proto = _CONVERSIONS[index]
    try:
        value = from_proto(message)
    except ArbitrageError as error:
        legible(str(error))
        return error.reason
    again = to_proto(value)
    # What a message leaves to the receiver is filled in once; after that nothing changes any more.
    if again != to_proto(from_proto(again)) or from_proto(again) != value:
        raise Wrong(f"{value!r} is not the same after the way to a message and back: {again!r}")
    return ACCEPTED
