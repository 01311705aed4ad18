"""Turns messages that services share into core values and back. Nothing else does.

Servicers and clients call this at the border: a message never travels inward past it, a core
value never outward. What cannot be converted is refused with the path of its field.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from enum import Enum
from typing import Any, Generic, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from arbitrage.core.calibration import CalibrationTable
from arbitrage.core.errors import (
    BudgetOutOfRange,
    FieldInvalid,
    Internal,
    SamplingOutOfRange,
)
from arbitrage.core.ports import RouterDescription, StepRequest
from arbitrage.core.shown import shown
from arbitrage.core.steps import (
    GeneratedStep,
    ModelIdentity,
    Sampling,
    Score,
    Source,
    Step,
    StopReason,
    Trajectory,
)
from arbitrage.v1 import generator_pb2, prm_pb2, router_pb2, trajectory_pb2

_MAX_TEMPERATURE = 2.0
# A message of 16 MiB holds millions of empty steps, and converting them would block the event loop
# for seconds; these take a few hundredths of one.
_MOST_STEPS = 16_384
EnumT = TypeVar("EnumT", bound=Enum)


class EnumTable(Generic[EnumT]):
    """Pairs each value of a core enum with the proto value of the same name."""

    def __init__(self, kind: type[EnumT], wire: EnumTypeWrapper, prefix: str) -> None:
        self._to_wire = {value: wire.Value(f"{prefix}_{value.name}") for value in kind}
        self._from_wire = {number: value for value, number in self._to_wire.items()}
        self._names = ", ".join(f"{prefix}_{value.name}" for value in kind)

    def to_proto(self, value: EnumT) -> Any:
        """Returns the proto value."""
        return self._to_wire[value]

    def from_proto(self, number: int, field: str) -> EnumT:
        """Returns the core value.

        Raises:
            FieldInvalid: the number is 0 or unknown.
        """
        value = self._from_wire.get(number)
        if value is None:
            raise FieldInvalid(field, number, "is not set or unknown", f"give one of {self._names}")
        return value


SOURCES = EnumTable(Source, trajectory_pb2.Source, "SOURCE")
STOP_REASONS = EnumTable(StopReason, trajectory_pb2.StopReason, "STOP_REASON")


def shortest(value: float) -> float:
    """Returns the decimal a caller wrote into a `float` field, which holds only 24 bits of it.

    Order is kept, so comparing two such values gives what comparing the fields would give.

    >>> shortest(0.699999988079071)
    0.7
    """
    if not math.isfinite(value):
        return value
    packed = struct.pack("f", value)
    for digits in range(6, 9):
        candidate = float(f"{value:.{digits}g}")
        if struct.pack("f", candidate) == packed:
            return candidate
    return float(f"{value:.9g}")


def duration_to_proto(seconds: float) -> Duration:
    """Returns a time of at least 0 s; what a clock's rounding put below counts as 0."""
    nanos = max(0, round(seconds * 1e9))
    return Duration(seconds=nanos // 10**9, nanos=nanos % 10**9)


def duration_from_proto(message: Duration) -> float:
    """Returns seconds."""
    return message.seconds + message.nanos / 1e9


def identity_to_proto(model: ModelIdentity) -> trajectory_pb2.ModelIdentity:
    """Returns the message that names the same weights."""
    return trajectory_pb2.ModelIdentity(model_id=model.model_id, revision=model.revision)


def identity_from_proto(message: trajectory_pb2.ModelIdentity) -> ModelIdentity:
    """Returns the weights a message names."""
    return ModelIdentity(message.model_id, message.revision)


def step_to_proto(step: Step) -> trajectory_pb2.Step:
    """Returns the message of a committed step."""
    return trajectory_pb2.Step(
        text=step.text,
        source=SOURCES.to_proto(step.source),
        stop_reason=STOP_REASONS.to_proto(step.stop_reason),
    )


def step_from_proto(message: trajectory_pb2.Step, field: str) -> Step:
    """Returns the step in a message.

    Raises:
        FieldInvalid: writer or stop reason is not set.
    """
    return Step(
        message.text,
        SOURCES.from_proto(message.source, f"{field}.source"),
        STOP_REASONS.from_proto(message.stop_reason, f"{field}.stop_reason"),
    )


def steps_from_proto(messages: Sequence[trajectory_pb2.Step]) -> tuple[Step, ...]:
    """Returns the field `steps` of any request; raises as `step_from_proto` does.

    Raises:
        FieldInvalid: there are more than any solution has.
    """
    if len(messages) > _MOST_STEPS:
        raise FieldInvalid(
            "steps",
            f"{len(messages)} steps",
            f"must be at most {_MOST_STEPS}",
            "send the steps of one solution",
        )
    return tuple(
        step_from_proto(message, f"steps[{index}]") for index, message in enumerate(messages)
    )


def sampling_to_proto(sampling: Sampling) -> trajectory_pb2.SamplingConfig:
    """Returns the message that draws tokens the same way."""
    return trajectory_pb2.SamplingConfig(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
    )


def sampling_from_proto(message: trajectory_pb2.SamplingConfig) -> Sampling:
    """Returns how a message says tokens are drawn; unset fields mean greedy decoding.

    Raises:
        SamplingOutOfRange
    """
    temperature, top_p = shortest(message.temperature), shortest(message.top_p)
    if not 0.0 <= temperature <= _MAX_TEMPERATURE:
        raise SamplingOutOfRange(
            "sampling.temperature",
            temperature,
            f"must be between 0 and {_MAX_TEMPERATURE:g}",
            "give 0 for greedy decoding",
        )
    if not 0.0 <= top_p <= 1.0:
        raise SamplingOutOfRange(
            "sampling.top_p", top_p, "must be above 0 and at most 1", "leave it out to keep all"
        )
    return Sampling(
        temperature,
        top_p or 1.0,
        message.top_k,
        message.seed if message.HasField("seed") else None,
    )


def step_request_to_proto(request: StepRequest) -> generator_pb2.GenerateStepRequest:
    """Returns the message that asks a generator for the same step."""
    message = generator_pb2.GenerateStepRequest(
        problem=request.trajectory.problem,
        steps=[step_to_proto(step) for step in request.trajectory.steps],
        sampling=sampling_to_proto(request.sampling),
        max_tokens=request.max_tokens,
        entropy_token_count=request.entropy_token_count,
        stream_text=request.stream_text,
    )
    if request.time_limit_s is not None:
        message.time_limit.CopyFrom(duration_to_proto(request.time_limit_s))
    return message


def step_request_from_proto(
    message: generator_pb2.GenerateStepRequest, default_max_tokens: int
) -> StepRequest:
    """Returns what a message asks a generator for.

    Raises:
        FieldInvalid, SamplingOutOfRange, BudgetOutOfRange
    """
    time_limit_s = None
    if message.HasField("time_limit"):
        time_limit_s = duration_from_proto(message.time_limit)
        if time_limit_s <= 0.0:
            raise BudgetOutOfRange(
                "time_limit", f"{time_limit_s} s", "must be above 0 s", "leave it out for no limit"
            )
    return StepRequest(
        Trajectory(message.problem, steps_from_proto(message.steps)),
        max_tokens=message.max_tokens or default_max_tokens,
        sampling=sampling_from_proto(message.sampling),
        entropy_token_count=message.entropy_token_count,
        stream_text=message.stream_text,
        time_limit_s=time_limit_s,
    )


def generated_step_to_proto(step: GeneratedStep) -> generator_pb2.GeneratedStep:
    """Returns the message of a step that nobody has decided on."""
    return generator_pb2.GeneratedStep(
        text=step.text,
        stop_reason=STOP_REASONS.to_proto(step.stop_reason),
        token_count=step.token_count,
        first_token_entropy=step.first_token_entropy,
        prefill_token_count=step.prefill_token_count,
        cached_token_count=step.cached_token_count,
        model=identity_to_proto(step.model),
    )


def generated_step_from_proto(message: generator_pb2.GeneratedStep) -> GeneratedStep:
    """Returns the step a generator sent.

    Raises:
        FieldInvalid: it does not say why it ended, or its entropy is no number. The
            generator is to blame and not the caller, so whoever asked it says `Internal`.
    """
    entropy = None
    if message.HasField("first_token_entropy"):
        entropy = shortest(message.first_token_entropy)
        if not math.isfinite(entropy):
            raise FieldInvalid(
                "result.first_token_entropy", entropy, "must be a finite number", "leave it out"
            )
    return GeneratedStep(
        text=message.text,
        stop_reason=STOP_REASONS.from_proto(message.stop_reason, "result.stop_reason"),
        token_count=message.token_count,
        model=identity_from_proto(message.model),
        first_token_entropy=entropy,
        prefill_token_count=message.prefill_token_count,
        cached_token_count=message.cached_token_count,
    )


def advantage_from_proto(message: router_pb2.EstimateAdvantageResponse) -> Score:
    """Returns the score a router sent.

    Raises:
        Internal: it is no probability.
    """
    return _score(message.score, message)


def reward_from_proto(message: prm_pb2.ScoreStepsResponse) -> Score:
    """Returns the one score a PRM was asked for.

    Raises:
        Internal: there is not exactly one, or it lies outside [0, 1].
    """
    if len(message.scores) != 1:
        raise Internal(f"the PRM sent {len(message.scores)} scores where one was asked for")
    return _score(message.scores[0], message)


def _score(
    value: float, message: router_pb2.EstimateAdvantageResponse | prm_pb2.ScoreStepsResponse
) -> Score:
    if not 0.0 <= value <= 1.0:
        raise Internal(f"{shown(message.model.model_id)} sent the score {value}, outside [0, 1]")
    return Score(
        shortest(value),
        identity_from_proto(message.model),
        message.prefill_token_count,
        message.cached_token_count,
    )


def router_to_proto(description: RouterDescription) -> router_pb2.GetRouterResponse:
    """Returns the message that says the same of a router."""
    table = description.calibration
    return router_pb2.GetRouterResponse(
        model=identity_to_proto(description.model),
        default_threshold=description.default_threshold,
        calibration=[
            router_pb2.CalibrationPoint(threshold=threshold, target_share=share)
            for threshold, share in zip(table.thresholds, table.target_shares, strict=True)
        ],
        annotated=description.is_annotated,
        score_rule=description.score_rule,
        prior_logit_shift=description.prior_logit_shift,
        advantage_margin=description.advantage_margin,
        rejected_revision=description.rejected_revision,
        rejected_reason=description.rejected_reason,
    )


def router_from_proto(message: router_pb2.GetRouterResponse) -> RouterDescription:
    """Returns what a router says of itself.

    Raises:
        Internal: its calibration table or one of its numbers cannot be used.
    """
    threshold = message.default_threshold
    if not 0.0 <= threshold <= 1.0:
        raise Internal(f"the router's default threshold {threshold} lies outside [0, 1]")
    for field in ("prior_logit_shift", "advantage_margin"):
        if not math.isfinite(getattr(message, field)):
            raise Internal(f"the router's {field} {getattr(message, field)} is no finite number")
    try:
        table = CalibrationTable(
            tuple(point.threshold for point in message.calibration),
            tuple(point.target_share for point in message.calibration),
        )
    except ValueError as error:
        raise Internal(f"the router's {error}") from None
    return RouterDescription(
        identity_from_proto(message.model),
        threshold,
        table,
        message.annotated,
        message.score_rule,
        message.prior_logit_shift,
        message.advantage_margin,
        message.rejected_revision,
        message.rejected_reason,
    )
