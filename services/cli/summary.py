"""What a policy's runs come to: the closing table of the demo and its JSON object. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from arbitrage.client import Solution
from arbitrage.core.ledger import TokenLedger
from arbitrage.core.steps import Source
from services.cli.render import ROLES, tokens_as_dict


@dataclass(frozen=True, slots=True)
class PolicyRun:
    """One problem solved, or not, under one policy. `latency_s` is what the client waited."""

    is_solved: bool
    latency_s: float
    solution: Solution


@dataclass(frozen=True, slots=True)
class PolicySummary:
    """All runs of one policy, at least one."""

    label: str
    runs: tuple[PolicyRun, ...]

    @property
    def solved_count(self) -> int:
        """Problems whose answer was right."""
        return sum(run.is_solved for run in self.runs)

    @property
    def mean_latency_s(self) -> float:
        """Mean time the client waited for a solution."""
        return statistics.fmean(run.latency_s for run in self.runs)

    @property
    def p50_latency_s(self) -> float:
        """Median time the client waited for a solution."""
        return statistics.median(run.latency_s for run in self.runs)

    @property
    def escalation_count(self) -> int:
        """Draft steps thrown away for the target's."""
        return sum(run.solution.ledger.escalation_count for run in self.runs)

    @property
    def escalation_rate(self) -> float:
        """Escalated over routed steps; 0 where none was routed."""
        routed = sum(run.solution.ledger.routed_step_count for run in self.runs)
        return self.escalation_count / routed if routed else 0.0

    @property
    def step_count(self) -> int:
        """Committed steps."""
        return sum(len(run.solution.steps) for run in self.runs)

    @property
    def target_share(self) -> float:
        """Share of committed steps that the target wrote."""
        written = sum(
            step.step.source is Source.TARGET for run in self.runs for step in run.solution.steps
        )
        return written / self.step_count if self.step_count else 0.0

    def tokens(self, role: str) -> TokenLedger:
        """Adds up one role's calls, tokens and times."""
        ledgers: list[TokenLedger] = [getattr(run.solution.ledger, role) for run in self.runs]
        return TokenLedger(
            decoded_count=sum(ledger.decoded_count for ledger in ledgers),
            kept_count=sum(ledger.kept_count for ledger in ledgers),
            discarded_count=sum(ledger.discarded_count for ledger in ledgers),
            cancelled_count=sum(ledger.cancelled_count for ledger in ledgers),
            prefill_count=sum(ledger.prefill_count for ledger in ledgers),
            cached_count=sum(ledger.cached_count for ledger in ledgers),
            call_count=sum(ledger.call_count for ledger in ledgers),
            time_s=sum(ledger.time_s for ledger in ledgers),
        )

    def as_dict(self) -> dict[str, object]:
        """Returns the summary with plain names, times in seconds."""
        return {
            "n": len(self.runs),
            "solved": self.solved_count,
            "mean_latency_s": self.mean_latency_s,
            "p50_latency_s": self.p50_latency_s,
            "escalation_rate": self.escalation_rate,
            "target_share": self.target_share,
            "target_calls": self.tokens("target").call_count,
            "escalations": self.escalation_count,
            "steps": self.step_count,
            "ledger": {role: tokens_as_dict(self.tokens(role)) for role in ROLES},
        }


def summary_table(summaries: Sequence[PolicySummary]) -> Table:
    """Returns the table that closes a demo."""
    table = Table(title="Same problems, same models, one after another", title_justify="left")
    table.add_column("policy")
    for heading in ("solved", "mean time", "p50 time", "target share", "escalations"):
        table.add_column(heading, justify="right")
    table.add_column("draft tokens\nkept / thrown away", justify="right")
    table.add_column("target tokens\nkept / thrown away", justify="right")
    for summary in summaries:
        table.add_row(
            summary.label,
            f"{summary.solved_count} of {len(summary.runs)}",
            f"{summary.mean_latency_s * 1e3:.0f} ms",
            f"{summary.p50_latency_s * 1e3:.0f} ms",
            f"{summary.target_share:.0%}",
            str(summary.escalation_count),
            _kept_and_wasted(summary.tokens("draft")),
            _kept_and_wasted(summary.tokens("target")),
        )
    return table


def _kept_and_wasted(tokens: TokenLedger) -> str:
    return f"{tokens.kept_count} / {tokens.discarded_count + tokens.cancelled_count}"
