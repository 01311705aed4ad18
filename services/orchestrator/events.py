"""Turns the loop's events into messages. The client has the other direction."""

from __future__ import annotations

from typing import assert_never

from arbitrage.core.events import DraftProposed, Event, Finished, StepCommitted, TokenDelta
from arbitrage.core.ledger import Ledger, TokenLedger
from arbitrage.core.limits import Budgets, Caps
from arbitrage.core.steps import Degradation, Score, Verdict
from arbitrage.v1 import orchestrator_pb2
from services.rpc.convert import (
    SOURCES,
    STOP_REASONS,
    EnumTable,
    duration_to_proto,
    identity_to_proto,
    step_to_proto,
)

DEGRADATIONS = EnumTable(Degradation, orchestrator_pb2.Degradation, "DEGRADATION")
_NO_VERDICT = Verdict(escalate=False)


def event_to_proto(event: Event) -> orchestrator_pb2.GenerateSolutionResponse:
    """Returns the message of one event."""
    match event:
        case TokenDelta():
            return orchestrator_pb2.GenerateSolutionResponse(
                token_delta=orchestrator_pb2.TokenDelta(
                    step_index=event.step_index,
                    source=SOURCES.to_proto(event.source),
                    text=event.text,
                )
            )
        case DraftProposed():
            return orchestrator_pb2.GenerateSolutionResponse(
                draft_proposed=orchestrator_pb2.DraftProposed(
                    step_index=event.step_index, text=event.text, token_count=event.token_count
                )
            )
        case StepCommitted():
            return orchestrator_pb2.GenerateSolutionResponse(step_committed=_committed(event))
        case Finished():
            return orchestrator_pb2.GenerateSolutionResponse(
                finished=orchestrator_pb2.Finished(
                    stop_reason=STOP_REASONS.to_proto(event.stop_reason),
                    ledger=ledger_to_proto(event.ledger),
                    escalation_rate=event.ledger.escalation_rate,
                )
            )
        case _:
            assert_never(event)


def budgets_to_proto(budgets: Budgets) -> orchestrator_pb2.Budgets:
    """Returns the message of some budgets; bounds that are not there stay unset."""
    message = orchestrator_pb2.Budgets(
        max_steps=budgets.max_steps,
        max_tokens=budgets.max_tokens,
        max_step_tokens=budgets.max_step_tokens,
        max_target_steps=budgets.max_target_steps,
    )
    if budgets.time_limit_s is not None:
        message.time_limit.CopyFrom(duration_to_proto(budgets.time_limit_s))
    return message


def caps_to_proto(caps: Caps) -> orchestrator_pb2.Budgets:
    """Returns the caps as the largest budgets that are taken."""
    return budgets_to_proto(
        Budgets(
            caps.max_steps,
            caps.max_tokens,
            caps.max_step_tokens,
            max_target_steps=caps.max_steps,
            time_limit_s=caps.time_limit_s,
        )
    )


def _committed(event: StepCommitted) -> orchestrator_pb2.StepCommitted:
    verdict = event.verdict or _NO_VERDICT
    prm = verdict.draft_score or verdict.target_score
    router = verdict.router_score
    return orchestrator_pb2.StepCommitted(
        step_index=event.step_index,
        step=step_to_proto(event.step),
        token_count=event.token_count,
        router_score=_value(router),
        draft_score=_value(verdict.draft_score),
        target_score=_value(verdict.target_score),
        first_token_entropy=verdict.first_token_entropy,
        threshold=verdict.threshold,
        router=None if router is None else identity_to_proto(router.model),
        prm=None if prm is None else identity_to_proto(prm.model),
        writer=identity_to_proto(event.writer),
        escalated=event.escalated,
        degradations=[DEGRADATIONS.to_proto(value) for value in event.degradations],
        draft_time=duration_to_proto(event.draft_time_s),
        decision_time=duration_to_proto(event.decision_time_s),
        target_time=duration_to_proto(event.target_time_s),
        elapsed=duration_to_proto(event.elapsed_s),
    )


def _value(score: Score | None) -> float | None:
    return None if score is None else score.value


def ledger_to_proto(ledger: Ledger) -> orchestrator_pb2.Ledger:
    """Returns the message of what a request has cost so far."""
    return orchestrator_pb2.Ledger(
        draft=_token_ledger(ledger.draft),
        target=_token_ledger(ledger.target),
        prm=_token_ledger(ledger.prm),
        router=_token_ledger(ledger.router),
        step_count=ledger.step_count,
        routed_step_count=ledger.routed_step_count,
        escalation_count=ledger.escalation_count,
        degraded_step_count=ledger.degraded_step_count,
        elapsed=duration_to_proto(ledger.elapsed_s),
        orchestrator_time=duration_to_proto(ledger.orchestrator_time_s),
    )


def _token_ledger(ledger: TokenLedger) -> orchestrator_pb2.TokenLedger:
    return orchestrator_pb2.TokenLedger(
        kept_count=ledger.kept_count,
        discarded_count=ledger.discarded_count,
        cancelled_count=ledger.cancelled_count,
        prefill_count=ledger.prefill_count,
        cached_count=ledger.cached_count,
        call_count=ledger.call_count,
        time=duration_to_proto(ledger.time_s),
    )
