"""Turns the public API's messages into core values. Pure; the other way is the server's.

Enums are matched by name: `STOP_REASON_DEADLINE` is `StopReason.DEADLINE`, and a test holds both
sides to the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Literal, TypeVar

from google.protobuf.duration_pb2 import Duration

from arbitrage.core.errors import Internal
from arbitrage.core.events import DraftProposed, Event, Finished, StepCommitted, TokenDelta
from arbitrage.core.ledger import Ledger, TokenLedger
from arbitrage.core.limits import Budgets, Caps
from arbitrage.core.steps import (
    Degradation,
    ModelIdentity,
    Score,
    Source,
    Step,
    StopReason,
    Verdict,
)
from arbitrage.v1 import orchestrator_pb2, trajectory_pb2

_Kind = TypeVar("_Kind", bound=Enum)


@dataclass(frozen=True, slots=True)
class RoleModel:
    """One model behind a server, and whether it answers now."""

    role: str
    model: ModelIdentity
    available: bool


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a server can do. `default_escalation_threshold` is None without a router."""

    models: tuple[RoleModel, ...]
    policies: tuple[str, ...]
    default_budgets: Budgets
    caps: Caps
    default_escalation_threshold: float | None
    resumable: bool


def event_from_proto(message: orchestrator_pb2.GenerateSolutionResponse) -> Event:
    """Returns the event a message carries.

    Raises:
        Internal: the message carries something this client does not know.
    """
    match message.WhichOneof("event"):
        case "draft_proposed":
            proposed = message.draft_proposed
            return DraftProposed(proposed.step_index, proposed.text, proposed.token_count)
        case "token_delta":
            delta = message.token_delta
            return TokenDelta(delta.step_index, _source(delta.source), delta.text)
        case "step_committed":
            return _committed(message.step_committed)
        case "finished":
            finished = message.finished
            return Finished(_stop_reason(finished.stop_reason), ledger_from_proto(finished.ledger))
        case _:
            raise Internal("the server sent an event this client does not know; upgrade the client")


def capabilities_from_proto(message: orchestrator_pb2.GetCapabilitiesResponse) -> Capabilities:
    """Returns what the server said of itself."""
    defaults, caps = message.default_budgets, message.budget_caps
    threshold = None
    if message.HasField("default_escalation_threshold"):
        threshold = _real(message.default_escalation_threshold)
    return Capabilities(
        models=tuple(
            RoleModel(entry.role, _identity(entry.model), entry.available)
            for entry in message.models
        ),
        policies=tuple(message.policies),
        default_budgets=Budgets(
            max_steps=defaults.max_steps,
            max_tokens=defaults.max_tokens,
            max_step_tokens=defaults.max_step_tokens,
            max_target_steps=(
                defaults.max_target_steps if defaults.HasField("max_target_steps") else None
            ),
            time_limit_s=(
                _seconds(defaults.time_limit) if defaults.HasField("time_limit") else None
            ),
        ),
        caps=Caps(
            max_steps=caps.max_steps,
            max_tokens=caps.max_tokens,
            max_step_tokens=caps.max_step_tokens,
            time_limit_s=_seconds(caps.time_limit),
            max_problem_bytes=message.max_problem_bytes,
        ),
        default_escalation_threshold=threshold,
        resumable=message.resumable,
    )


def _committed(message: orchestrator_pb2.StepCommitted) -> StepCommitted:
    step = Step(
        message.step.text, _source(message.step.source), _stop_reason(message.step.stop_reason)
    )
    # A target's step that threw no draft away was never judged: target_only, or no draft there.
    was_judged = message.escalated or step.source is Source.DRAFT
    return StepCommitted(
        step_index=message.step_index,
        step=step,
        token_count=message.token_count,
        writer=_identity(message.writer),
        verdict=_verdict(message) if was_judged else None,
        degradations=tuple(_degradation(value) for value in message.degradations),
        draft_time_s=_seconds(message.draft_time),
        decision_time_s=_seconds(message.decision_time),
        target_time_s=_seconds(message.target_time),
        elapsed_s=_seconds(message.elapsed),
    )


def _verdict(message: orchestrator_pb2.StepCommitted) -> Verdict:
    router, prm = _identity(message.router), _identity(message.prm)

    def score(value: float | None, model: ModelIdentity) -> Score | None:
        return None if value is None else Score(value, model)

    return Verdict(
        escalate=message.escalated,
        router_score=score(_given(message, "router_score"), router),
        draft_score=score(_given(message, "draft_score"), prm),
        target_score=score(_given(message, "target_score"), prm),
        first_token_entropy=_given(message, "first_token_entropy"),
        threshold=_given(message, "threshold"),
        is_load_priced=orchestrator_pb2.DEGRADATION_LOAD_PRICED_THRESHOLD in message.degradations,
    )


_OptionalReal = Literal[
    "router_score", "draft_score", "target_score", "first_token_entropy", "threshold"
]


def _given(message: orchestrator_pb2.StepCommitted, field: _OptionalReal) -> float | None:
    return _real(getattr(message, field)) if message.HasField(field) else None


def _real(value: float) -> float:
    # A `float` field holds seven digits; those after them are nothing anybody wrote.
    return float(f"{value:.7g}")


def ledger_from_proto(message: orchestrator_pb2.Ledger) -> Ledger:
    """Returns what a request has cost, as a message says it."""
    return Ledger(
        draft=_token_ledger(message.draft),
        target=_token_ledger(message.target),
        prm=_token_ledger(message.prm),
        router=_token_ledger(message.router),
        step_count=message.step_count,
        routed_step_count=message.routed_step_count,
        escalation_count=message.escalation_count,
        degraded_step_count=message.degraded_step_count,
        elapsed_s=_seconds(message.elapsed),
    )


def _token_ledger(message: orchestrator_pb2.TokenLedger) -> TokenLedger:
    return TokenLedger(
        decoded_count=message.kept_count + message.discarded_count + message.cancelled_count,
        kept_count=message.kept_count,
        discarded_count=message.discarded_count,
        cancelled_count=message.cancelled_count,
        prefill_count=message.prefill_count,
        cached_count=message.cached_count,
        call_count=message.call_count,
        time_s=_seconds(message.time),
    )


def _identity(message: trajectory_pb2.ModelIdentity) -> ModelIdentity:
    return ModelIdentity(message.model_id, message.revision)


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _source(value: int) -> Source:
    return _named(Source, trajectory_pb2.Source.Name, "SOURCE_", value)


def _stop_reason(value: int) -> StopReason:
    return _named(StopReason, trajectory_pb2.StopReason.Name, "STOP_REASON_", value)


def _degradation(value: int) -> Degradation:
    return _named(Degradation, orchestrator_pb2.Degradation.Name, "DEGRADATION_", value)


def _named(kind: type[_Kind], name_of: Callable[[int], str], prefix: str, value: int) -> _Kind:
    try:
        return kind[name_of(value).removeprefix(prefix)]
    except (KeyError, ValueError):
        raise Internal(
            f"the server sent {kind.__name__} {value}, which this client does not know; "
            "upgrade the client"
        ) from None
