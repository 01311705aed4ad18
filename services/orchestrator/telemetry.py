"""What an orchestrator counts. Every series is there at 0 from the start, labels are bounded."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from arbitrage.core.events import Event, StepCommitted
from arbitrage.core.ledger import Ledger, TokenLedger
from arbitrage.core.ports import Clock, Generator, StepRequest
from arbitrage.core.steps import GeneratedStep, Source
from services.orchestrator.admission import Admission
from services.rpc.telemetry import SECONDS_BUCKETS

ROLES: Final = ("draft", "target", "prm", "router")
_PHASES: Final = ("draft", "decision", "target", "orchestrator")
_OUTCOMES: Final = ("kept", "discarded", "cancelled", "prefilled", "cached")
_CACHE_RESULTS: Final = ("hit", "shared", "miss", "bypass")
_RECENT_WEIGHT: Final = 0.1


class CacheMetrics:
    """Counts what the prefix cache is asked."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "arbitrage_prefix_cache_requests",
            "Model calls by what the prefix cache did with them: hit (known), shared (another "
            "request was asking the same), miss, bypass (sampling is not deterministic).",
            ("role", "result"),
            registry=registry,
        )
        for role in ROLES:
            for result in _CACHE_RESULTS:
                self._requests.labels(role, result)

    def count(self, role: str, result: str) -> None:
        """Counts one call."""
        self._requests.labels(role, result).inc()


class SolutionMetrics:
    """Counts what solutions come to, from their events and from what they cost in the end."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._steps = Counter(
            "arbitrage_steps", "Committed steps.", ("source", "degraded"), registry=registry
        )
        self._escalations = Counter(
            "arbitrage_escalations", "Draft steps thrown away for the target's.", registry=registry
        )
        self._seconds = Histogram(
            "arbitrage_phase_seconds",
            "Time of a step's phases, and of the orchestrator per solution.",
            ("phase",),
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._tokens = Counter(
            "arbitrage_tokens",
            "Tokens of models; all but the kept are counted when their solution ends.",
            ("role", "outcome"),
            registry=registry,
        )
        for source in Source:
            for degraded in ("false", "true"):
                self._steps.labels(source.value, degraded)
        for phase in _PHASES:
            self._seconds.labels(phase)
        for role in ROLES:
            for outcome in _OUTCOMES:
                self._tokens.labels(role, outcome)

    def observe(self, event: Event) -> None:
        """Counts one event."""
        if isinstance(event, StepCommitted):
            self._observe_step(event)

    def _observe_step(self, event: StepCommitted) -> None:
        source = event.step.source.value
        self._steps.labels(source, "true" if event.degradations else "false").inc()
        self._tokens.labels(source, "kept").inc(event.token_count)
        if event.escalated:
            self._escalations.inc()
        for phase, seconds in (
            ("draft", event.draft_time_s),
            ("decision", event.decision_time_s),
            ("target", event.target_time_s),
        ):
            if seconds > 0.0:
                self._seconds.labels(phase).observe(seconds)

    def observe_ledger(self, ledger: Ledger) -> None:
        """Counts what a solution that has ended cost, also one that has not finished."""
        self._seconds.labels("orchestrator").observe(ledger.orchestrator_time_s)
        for role in ROLES:
            tokens: TokenLedger = getattr(ledger, role)
            self._tokens.labels(role, "discarded").inc(tokens.discarded_count)
            self._tokens.labels(role, "cancelled").inc(tokens.cancelled_count)
            self._tokens.labels(role, "prefilled").inc(tokens.prefill_count)
            self._tokens.labels(role, "cached").inc(tokens.cached_count)


class RouterMetrics:
    """Counts what the router could not read."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._truncated = Counter(
            "arbitrage_router_truncated_tokens",
            "History tokens that the router cut to fit its context.",
            registry=registry,
        )

    def count_truncated(self, token_count: int) -> None:
        """Counts what was cut for one judgement."""
        self._truncated.inc(token_count)


class TargetDemand:
    """Says how much work the target has before it, in front of it: also while none is running."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._mean_step_s = 0.0
        self._inflight = Gauge(
            "arbitrage_target_inflight_steps", "Steps the target is writing.", registry=registry
        )
        demand = Gauge(
            "arbitrage_target_demand_seconds",
            "Time the target needs for the steps it is writing.",
            registry=registry,
        )
        self._inflight_count = 0
        demand.set_function(lambda: self._inflight_count * self._mean_step_s)

    def begin(self) -> None:
        """Counts a step that the target is asked for."""
        self._inflight_count += 1
        self._inflight.inc()

    def end(self, took_s: float | None) -> None:
        """Counts it out; `took_s` is its time if it was written."""
        self._inflight_count -= 1
        self._inflight.dec()
        if took_s is not None:
            first = self._mean_step_s == 0.0
            self._mean_step_s += (1.0 if first else _RECENT_WEIGHT) * (took_s - self._mean_step_s)


@dataclass(frozen=True, slots=True)
class CountedTarget:
    """The target, with its demand counted."""

    inner: Generator
    demand: TargetDemand
    clock: Clock

    async def generate_step(
        self, request: StepRequest
    ) -> AsyncGenerator[str | GeneratedStep, None]:
        """Yields what the target does."""
        started_s, took_s = self.clock(), None
        self.demand.begin()
        try:
            async with aclosing(self.inner.generate_step(request)) as items:
                async for item in items:
                    if isinstance(item, GeneratedStep):
                        took_s = self.clock() - started_s
                    yield item
        finally:
            self.demand.end(took_s)


def register_admission(registry: CollectorRegistry, admission: Admission) -> None:
    """Shows how many requests run and wait."""
    for name, text, read in (
        ("running", "Solutions that are running.", lambda: admission.running_count),
        ("waiting", "Solutions that wait for a place.", lambda: admission.waiting_count),
    ):
        Gauge(f"arbitrage_solutions_{name}", text, registry=registry).set_function(read)
