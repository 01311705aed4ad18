"""What a solution's stream tells. `Event` is a closed union, taken apart by `match`."""

from __future__ import annotations

from dataclasses import dataclass

from arbitrage.core.ledger import Ledger
from arbitrage.core.steps import Degradation, ModelIdentity, Source, Step, StopReason, Verdict


@dataclass(frozen=True, slots=True)
class DraftProposed:
    """The draft wrote a step that is not yet decided on."""

    step_index: int
    text: str
    token_count: int


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """A piece of a step's text as it is decoded; a draft's may yet be thrown away."""

    step_index: int
    source: Source
    text: str


@dataclass(frozen=True, slots=True)
class StepCommitted:
    """A step is part of the solution now. Times are seconds as the loop saw them."""

    step_index: int
    step: Step
    token_count: int
    writer: ModelIdentity
    verdict: Verdict | None
    degradations: tuple[Degradation, ...]
    draft_time_s: float
    decision_time_s: float
    target_time_s: float
    elapsed_s: float

    @property
    def escalated(self) -> bool:
        """Whether a draft step was thrown away for this one."""
        return self.verdict is not None and self.step.source is Source.TARGET


@dataclass(frozen=True, slots=True)
class Finished:
    """The solution ended. Always the last event."""

    stop_reason: StopReason
    ledger: Ledger


Event = DraftProposed | TokenDelta | StepCommitted | Finished
