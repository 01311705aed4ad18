"""What a request cost, counted where it happens and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field

from arbitrage.core.steps import GeneratedStep, Score


@dataclass(slots=True)
class TokenLedger:
    """One role's calls and tokens. Scorers decode nothing, so only prompt counts are set.

    Every decoded token is kept, discarded (its step was finished and thrown away), cancelled (the
    request ended first), or still pending a verdict.
    """

    decoded_count: int = 0
    kept_count: int = 0
    discarded_count: int = 0
    cancelled_count: int = 0
    prefill_count: int = 0
    cached_count: int = 0
    call_count: int = 0
    time_s: float = 0.0

    @property
    def pending_count(self) -> int:
        """Decoded tokens on which nothing has been decided."""
        return self.decoded_count - self.kept_count - self.discarded_count - self.cancelled_count

    def record_answer(self, answer: GeneratedStep | Score) -> None:
        """Counts what an answered call decoded and the prompt tokens it took."""
        self.prefill_count += answer.prefill_token_count
        self.cached_count += answer.cached_token_count
        if isinstance(answer, GeneratedStep):
            self.decoded_count += answer.token_count

    def keep(self, step: GeneratedStep) -> None:
        """Counts a step's tokens as part of the solution."""
        self.kept_count += step.token_count

    def discard_pending(self) -> None:
        """Counts what was decoded and not kept as thrown away."""
        self.discarded_count += self.pending_count

    def cancel_pending(self) -> None:
        """Counts what was decoded and not kept as cut off by the request's end."""
        self.cancelled_count += self.pending_count


@dataclass(slots=True)
class Ledger:
    """What one request cost. The loop owns it while it runs; `Finished` hands it over.

    `routed_step_count` counts the steps on which a draft was judged, so the escalation rate is
    `escalation_count / routed_step_count`.
    """

    draft: TokenLedger = field(default_factory=TokenLedger)
    target: TokenLedger = field(default_factory=TokenLedger)
    prm: TokenLedger = field(default_factory=TokenLedger)
    router: TokenLedger = field(default_factory=TokenLedger)
    step_count: int = 0
    routed_step_count: int = 0
    escalation_count: int = 0
    degraded_step_count: int = 0
    elapsed_s: float = 0.0

    @property
    def escalation_rate(self) -> float:
        """Share of routed steps that were escalated; 0 where none was routed."""
        return self.escalation_count / self.routed_step_count if self.routed_step_count else 0.0

    def discard_pending(self) -> None:
        """Counts what both models decoded and is not kept as thrown away."""
        self.draft.discard_pending()
        self.target.discard_pending()

    def cancel_pending(self) -> None:
        """Counts what both models decoded and is not kept as cut off by the request's end."""
        self.draft.cancel_pending()
        self.target.cancel_pending()

    @property
    def used_token_count(self) -> int:
        """Tokens decoded for the request, kept or not, and prompt tokens computed for it."""
        models = (self.draft, self.target, self.prm, self.router)
        return sum(model.decoded_count + model.prefill_count for model in models)

    @property
    def orchestrator_time_s(self) -> float:
        """Part of `elapsed_s` in which no model was working for the request."""
        models = (self.draft, self.target, self.prm, self.router)
        return max(0.0, self.elapsed_s - sum(model.time_s for model in models))
