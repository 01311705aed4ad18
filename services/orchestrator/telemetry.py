"""What an orchestrator counts. Every series is there at 0 from the start, labels are bounded."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from arbitrage.core.errors import TargetUnavailable
from arbitrage.core.events import Event, StepCommitted
from arbitrage.core.ledger import Ledger, TokenLedger
from arbitrage.core.ports import Clock, Generator, RouterDescription, StepRequest
from arbitrage.core.steps import GeneratedStep, ModelIdentity, Score, Source
from services.orchestrator.admission import Admission, Outcome
from services.rpc.telemetry import ROLES, SECONDS_BUCKETS

_PHASES: Final = ("draft", "decision", "target", "orchestrator")
_OUTCOMES: Final = ("kept", "discarded", "cancelled", "prefilled", "cached", "shadow")
_FEEDBACK_RESULTS: Final = ("written", "no_room", "failed")
_CACHE_RESULTS: Final = ("hit", "shared", "miss", "bypass")
_STORE_OPERATIONS: Final = ("get", "put", "session", "quota", "feedback")
_SESSION_RESULTS: Final = ("new", "resumed", "followed", "replayed", "restored", "taken")
_STORE_BUCKETS: Final = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.25)
_RECENT_WEIGHT: Final = 0.1
# Longer than an autoscaler's look at its metrics takes to come round.
_MISSED_FOR_S: Final = 60.0
_MISSED_STEPS: Final = 1024
# Of the rate at which steps come: a burst counts at once, and is forgotten within a minute.
_RATE_MEMORY_S: Final = 15.0
_FEEDBACK_WEIGHT: Final = 0.02  # about the last fifty records


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


class StoreMetrics:
    """Counts what orchestrators ask of the store that they share."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "arbitrage_store_seconds",
            "Time of the shared store's answers.",
            ("operation",),
            buckets=_STORE_BUCKETS,
            registry=registry,
        )
        self._failures = Counter(
            "arbitrage_store_failures",
            "Questions that the shared store did not answer.",
            ("operation",),
            registry=registry,
        )
        self._up = Gauge(
            "arbitrage_store_up",
            "1 while the shared store answers, 0 after a failure.",
            registry=registry,
        )
        for operation in _STORE_OPERATIONS:
            self._seconds.labels(operation)
            self._failures.labels(operation)

    def observe(self, operation: str, seconds: float) -> None:
        """Counts an answer."""
        self._seconds.labels(operation).observe(seconds)

    def count_failure(self, operation: str) -> None:
        """Counts a question without an answer."""
        self._failures.labels(operation).inc()

    def is_up(self, value: bool) -> None:
        """Says whether the store answered."""
        self._up.set(value)


class SessionMetrics:
    """Counts what becomes of solutions that can be resumed."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._sessions = Counter(
            "arbitrage_sessions",
            "Calls with a request_id by what their session came to: new, resumed (went on from "
            "committed steps), followed (another call wrote it), replayed (it had ended), restored "
            "(Redis had lost it), taken (another call went on with it).",
            ("result",),
            registry=registry,
        )
        self._held = Gauge(
            "arbitrage_sessions_held", "Sessions this orchestrator goes on with.", registry=registry
        )
        for result in _SESSION_RESULTS:
            self._sessions.labels(result)

    def count(self, result: str) -> None:
        """Counts one call."""
        self._sessions.labels(result).inc()

    def held(self, count: int) -> None:
        """Says how many leases are held."""
        self._held.set(count)


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

    def count_shadow(self, token_count: int) -> None:
        """Counts tokens that the target wrote for feedback, for no solution."""
        self._tokens.labels("target", "shadow").inc(token_count)

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

    def observe_ledger(self, ledger: Ledger, before: Ledger) -> None:
        """Counts what a solution that has ended cost, also one that has not finished.

        `before` is what it had cost when it was resumed: another orchestrator's to count.
        """
        own_s = ledger.orchestrator_time_s - before.orchestrator_time_s
        self._seconds.labels("orchestrator").observe(max(0.0, own_s))
        for role in ROLES:
            tokens: TokenLedger = getattr(ledger, role)
            known: TokenLedger = getattr(before, role)
            for outcome, now, then in (
                ("discarded", tokens.discarded_count, known.discarded_count),
                ("cancelled", tokens.cancelled_count, known.cancelled_count),
                ("prefilled", tokens.prefill_count, known.prefill_count),
                ("cached", tokens.cached_count, known.cached_count),
            ):
                self._tokens.labels(role, outcome).inc(now - then)


class AdmissionMetrics:
    """Counts what becomes of requests that ask for a place. No tenant: there is no end of them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._results = Counter(
            "arbitrage_admissions",
            "Requests by what became of them: admitted, refused (the queue was full), pushed_out "
            "(of a full queue, by another tenant's), expired (no place within their time).",
            ("result",),
            registry=registry,
        )
        self._seconds = Histogram(
            "arbitrage_admission_wait_seconds",
            "Time that admitted requests waited for their place.",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        for outcome in Outcome:
            self._results.labels(outcome.value)

    def observe(self, outcome: Outcome, waited_s: float) -> None:
        """Counts one request."""
        self._results.labels(outcome.value).inc()
        if outcome is Outcome.ADMITTED:
            self._seconds.observe(waited_s)


class QuotaMetrics:
    """Counts what tenants are refused by their own limits."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._refusals = Counter(
            "arbitrage_quota_refusals",
            "Requests of tenants that had used up their requests or tokens of a minute.",
            ("quota",),
            registry=registry,
        )
        self._fallbacks = Counter(
            "arbitrage_quota_fallbacks",
            "Questions about quotas that this orchestrator answered alone: the store was away.",
            registry=registry,
        )
        for quota in ("requests", "tokens"):
            self._refusals.labels(quota)

    def count_refusal(self, quota: str) -> None:
        """Counts a request that was refused."""
        self._refusals.labels(quota).inc()

    def count_fallback(self) -> None:
        """Counts a question that the store did not answer."""
        self._fallbacks.inc()


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


class FeedbackMetrics:
    """Counts feedback records, and how far the router's predictions lie from what they say."""

    def __init__(
        self, registry: CollectorRegistry, count_shadow_tokens: Callable[[int], None]
    ) -> None:
        self.count_shadow_tokens = count_shadow_tokens
        self._records = Counter(
            "arbitrage_feedback_records",
            "Steps chosen for feedback by what became of them: written, no_room (the target was "
            "busy), failed (a model or the sink).",
            ("result",),
            registry=registry,
        )
        self._predicted = Counter(
            "arbitrage_feedback_predicted_advantage",
            "Sum of the probabilities of an advantage that the router gave to observed steps.",
            registry=registry,
        )
        self._observed = Counter(
            "arbitrage_feedback_observed_advantage",
            "Observed steps that had one.",
            registry=registry,
        )
        self._drift = Gauge(
            "arbitrage_router_drift",
            "Predicted minus observed advantage, recent observed steps of the serving router "
            "weighing most.",
            registry=registry,
        )
        self._drift_of: ModelIdentity | None = None
        self._mean = 0.0
        for result in _FEEDBACK_RESULTS:
            self._records.labels(result)

    def count(self, result: str) -> None:
        """Counts a step that was chosen."""
        self._records.labels(result).inc()

    def observe(self, score: Score, advantage: float, router: RouterDescription) -> None:
        """Compares the router's score of a step with its measured advantage."""
        clipped = min(1 - 1e-9, max(1e-9, score.value))
        logit = math.log(clipped / (1 - clipped)) + router.prior_logit_shift
        # The logistic function, written so that no shift is too large for it.
        predicted = 0.5 * (1 + math.tanh(logit / 2))
        observed = float(advantage > router.advantage_margin)
        self._predicted.inc(predicted)
        self._observed.inc(observed)
        if self._drift_of != score.model:
            # What another router got wrong says nothing of this one.
            self._drift_of, self._mean = score.model, predicted - observed
        self._mean += _FEEDBACK_WEIGHT * (predicted - observed - self._mean)
        self._drift.set(self._mean)


class _Rate:
    """Says how often something happens, the latest seconds weighing most."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._per_s = 0.0
        self._at_s = clock()

    def count(self) -> None:
        """Counts one."""
        self._per_s, self._at_s = self.per_s() + 1 / _RATE_MEMORY_S, self._clock()

    def per_s(self) -> float:
        """Returns how many come in a second."""
        return self._per_s * math.exp((self._at_s - self._clock()) / _RATE_MEMORY_S)


class TargetDemand:
    """Says how much work the target has before it, in front of it: also while none is running."""

    def __init__(self, registry: CollectorRegistry, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._asked = _Rate(clock)
        self._mean_step_s = 0.0
        self._missed_s: deque[float] = deque(maxlen=_MISSED_STEPS)
        self._inflight = Gauge(
            "arbitrage_target_inflight_steps",
            "Steps the target is asked for and has not written yet.",
            registry=registry,
        )
        demand = Gauge(
            "arbitrage_target_demand_seconds",
            "Seconds of the target's work that arrive in a second: draft steps a second, times the "
            "share that is escalated, times the time of a target step. It is how many steps are "
            "written at once where the target keeps up.",
            registry=registry,
        )
        self.inflight_count = 0
        # Draft steps a second times their escalated share: how often the target is asked.
        demand.set_function(lambda: self._asked.per_s() * self._mean_step_s)

    def begin(self) -> None:
        """Counts a step that the target is asked for."""
        self.inflight_count += 1
        self._inflight.inc()
        self._asked.count()

    def end(self, took_s: float | None) -> None:
        """Counts it out; `took_s` is its time if it was written."""
        self.inflight_count -= 1
        self._inflight.dec()
        if took_s is not None:
            self._missed_s.clear()
            first = self._mean_step_s == 0.0
            self._mean_step_s += (1.0 if first else _RECENT_WEIGHT) * (took_s - self._mean_step_s)

    def miss(self) -> None:
        """Remembers a step that no target could be reached for."""
        self._missed_s.append(self._clock())

    def missed_count(self) -> int:
        """Returns how many such steps there were lately, since the target last wrote one."""
        since_s = self._clock() - _MISSED_FOR_S
        return sum(moment_s > since_s for moment_s in tuple(self._missed_s))


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
        except TargetUnavailable:
            self.demand.miss()
            raise
        finally:
            self.demand.end(took_s)


def register_price(registry: CollectorRegistry, price: Callable[[], float]) -> None:
    """Shows the price of the target."""
    Gauge(
        "arbitrage_target_price",
        "How far thresholds have risen to what their callers allow: 0 not at all, 1 all the way.",
        registry=registry,
    ).set_function(price)


def register_admission(registry: CollectorRegistry, admission: Admission) -> None:
    """Shows how many requests run and wait."""
    for name, text, read in (
        ("running", "Solutions that are running.", lambda: admission.running_count),
        ("waiting", "Solutions that wait for a place.", lambda: admission.waiting_count),
    ):
        Gauge(f"arbitrage_solutions_{name}", text, registry=registry).set_function(read)


def register_target_queue(
    registry: CollectorRegistry, admission: Admission, demand: TargetDemand
) -> None:
    """Shows the steps that will want the target beside those it is asked for.

    It comes before them: solutions that wait for a place are the steps of a moment later. And it
    is there while no target is: a step that found none is gone at once, but was wanted.
    """

    def depth() -> float:
        share = demand.inflight_count / max(1, admission.running_count)
        return demand.missed_count() + admission.waiting_count * share

    Gauge(
        "arbitrage_target_queue_depth",
        "Steps that want the target beside those it is asked for: of the solutions that wait for "
        "a place, as large a part as it is writing for among those that run; and steps that found "
        "no target within the last minute, until it writes one.",
        registry=registry,
    ).set_function(depth)
