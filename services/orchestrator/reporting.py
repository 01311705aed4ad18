"""Tells the log and the trace how a solution goes, without a word of its text."""

from __future__ import annotations

import logging
from typing import assert_never

from arbitrage.core.events import DraftProposed, Event, Finished, StepCommitted, TokenDelta
from services.rpc.log_context import Field, bind
from services.rpc.tracing import current_span

_log = logging.getLogger(__name__)


def report(event: Event) -> None:
    """Adds a step to the call's span; of the end, a line in the log too."""
    match event:
        case StepCommitted():
            current_span().add_event("step committed", _of_step(event))
            # What is asked and logged from here on belongs to the step after it.
            bind(step_index=event.step_index + 1)
        case Finished():
            fields = _of_solution(event)
            current_span().show(fields)
            _log.info("solution finished", extra={"fields": fields})
        case DraftProposed() | TokenDelta():
            pass
        case _:
            assert_never(event)


def _of_step(step: StepCommitted) -> dict[str, Field]:
    fields: dict[str, Field] = {
        "step_index": step.step_index,
        "source": step.step.source.value,
        "escalated": step.escalated,
        "degraded": bool(step.degradations),
        "token_count": step.token_count,
        "model_revision": step.writer.revision,
    }
    if step.verdict is not None and step.verdict.router_score is not None:
        fields["router_revision"] = step.verdict.router_score.model.revision
        fields["router_score"] = step.verdict.router_score.value
    return fields


def _of_solution(finished: Finished) -> dict[str, Field]:
    ledger = finished.ledger
    return {
        "stop_reason": finished.stop_reason.value,
        "steps": ledger.step_count,
        "escalations": ledger.escalation_count,
        "degraded_steps": ledger.degraded_step_count,
        "tokens": ledger.draft.kept_count + ledger.target.kept_count,
        "draft_tokens": ledger.draft.decoded_count,
        "target_tokens": ledger.target.decoded_count,
        "seconds": round(ledger.elapsed_s, 3),
    }
