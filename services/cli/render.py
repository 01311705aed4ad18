"""How a solution's events look: as lines for a person and as JSON for a program. Pure."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import assert_never

from rich.text import Text

from arbitrage.core.events import DraftProposed, Event, Finished, StepCommitted, TokenDelta
from arbitrage.core.ledger import Ledger, TokenLedger
from arbitrage.core.steps import ModelIdentity, Score, Source, Verdict

_COLOUR = {Source.DRAFT: "cyan", Source.TARGET: "magenta"}
ROLES = ("draft", "target", "prm", "router")


class StepLines:
    """Turns the events of one solution into lines.

    It remembers the draft's proposal, so that a rejected one can be shown beside what replaced it.
    """

    def __init__(self) -> None:
        self._proposal: DraftProposed | None = None

    def lines(self, event: Event) -> tuple[Text, ...]:
        """Returns what there is to show for an event; often nothing."""
        match event:
            case DraftProposed():
                self._proposal = event
                return ()
            case TokenDelta():
                return ()
            case StepCommitted():
                proposal, self._proposal = self._proposal, None
                if event.escalated and proposal is not None:
                    return (_rejected_line(proposal, event), _step_line(event))
                return (_step_line(event),)
            case Finished():
                return (_closing_line(event),)
            case _:
                assert_never(event)


def event_as_json(event: Event) -> str:
    """Returns an event as one line of JSON with its kind under `event`."""
    match event:
        case DraftProposed():
            content = {"event": "draft_proposed", **asdict(event)}
        case TokenDelta():
            content = {"event": "token_delta", **asdict(event), "source": event.source.value}
        case StepCommitted():
            content = {"event": "step_committed", **_committed_as_dict(event)}
        case Finished():
            content = {
                "event": "finished",
                "stop_reason": event.stop_reason.value,
                "escalation_rate": event.ledger.escalation_rate,
                "ledger": ledger_as_dict(event.ledger),
            }
        case _:
            assert_never(event)
    return json.dumps(content, ensure_ascii=False)


def ledger_as_dict(ledger: Ledger) -> dict[str, object]:
    """Returns a ledger with plain names, times in seconds."""
    return {
        **{role: tokens_as_dict(getattr(ledger, role)) for role in ROLES},
        "steps": ledger.step_count,
        "routed_steps": ledger.routed_step_count,
        "escalations": ledger.escalation_count,
        "degraded_steps": ledger.degraded_step_count,
        "elapsed_s": ledger.elapsed_s,
        "orchestrator_time_s": ledger.orchestrator_time_s,
    }


def tokens_as_dict(tokens: TokenLedger) -> dict[str, object]:
    """Returns one role's part of a ledger with plain names."""
    return {
        "kept": tokens.kept_count,
        "discarded": tokens.discarded_count,
        "cancelled": tokens.cancelled_count,
        "prefill": tokens.prefill_count,
        "cached": tokens.cached_count,
        "calls": tokens.call_count,
        "time_s": tokens.time_s,
    }


def _committed_as_dict(event: StepCommitted) -> dict[str, object]:
    verdict = event.verdict or Verdict(escalate=False)
    return {
        "step_index": event.step_index,
        "text": event.step.text,
        "source": event.step.source.value,
        "stop_reason": event.step.stop_reason.value,
        "escalated": event.escalated,
        "token_count": event.token_count,
        "writer": _identity_as_dict(event.writer),
        "router_score": _value_of(verdict.router_score),
        "draft_score": _value_of(verdict.draft_score),
        "target_score": _value_of(verdict.target_score),
        "first_token_entropy": verdict.first_token_entropy,
        "threshold": verdict.threshold,
        "degradations": [degradation.value for degradation in event.degradations],
        "draft_time_s": event.draft_time_s,
        "decision_time_s": event.decision_time_s,
        "target_time_s": event.target_time_s,
        "elapsed_s": event.elapsed_s,
    }


def _identity_as_dict(model: ModelIdentity) -> dict[str, str]:
    return {"model_id": model.model_id, "revision": model.revision}


def _value_of(score: Score | None) -> float | None:
    return None if score is None else score.value


def _step_line(event: StepCommitted) -> Text:
    source = event.step.source
    # The rejected draft's line has its own time and score, so the target's shows only the target's.
    is_second = event.escalated
    time_s = event.target_time_s
    if not is_second:
        time_s += event.draft_time_s + event.decision_time_s
    score = "" if is_second else _judgement(event.verdict)
    line = _line(str(event.step_index + 1), source.value, _COLOUR[source], score, time_s)
    line.append(event.step.text)
    for degradation in event.degradations:
        line.append(f"  [{degradation.value}]", "yellow")
    return line


def _rejected_line(proposal: DraftProposed, event: StepCommitted) -> Text:
    time_s = event.draft_time_s + event.decision_time_s
    line = _line("", "rejected", "dim", _judgement(event.verdict), time_s)
    line.append(proposal.text, "dim strike")
    return line


def _line(number: str, writer: str, style: str, score: str, time_s: float) -> Text:
    return Text.assemble(
        (f"{number:>3}  ", "dim"),
        (f"{writer:<8}  ", style),
        (f"{score:<8}  {time_s * 1e3:>6.0f} ms  ", "dim"),
    )


def _judgement(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    if verdict.router_score is not None:
        return f"ŷ {verdict.router_score.value:.2f}"
    if verdict.draft_score is not None:
        return f"s {verdict.draft_score.value:.2f}"
    if verdict.first_token_entropy is not None:
        return f"H {verdict.first_token_entropy:.2f}"
    return ""


def _closing_line(event: Finished) -> Text:
    ledger = event.ledger
    kept = ledger.draft.kept_count + ledger.target.kept_count
    wasted = sum(
        tokens.discarded_count + tokens.cancelled_count for tokens in (ledger.draft, ledger.target)
    )
    routed = (
        f"{ledger.escalation_count} of {ledger.routed_step_count} drafts escalated "
        f"({ledger.escalation_rate:.0%}), "
        if ledger.routed_step_count
        else ""
    )
    return Text(
        f"     {ledger.step_count} steps, {routed}"
        f"{kept} tokens kept, {wasted} thrown away, {ledger.elapsed_s:.2f} s, "
        f"ended by {event.stop_reason.value}",
        "dim",
    )
