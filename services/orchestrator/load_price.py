"""Prices the target by how saturated it is, and escalates less the more it costs.

Only where a caller allowed it, and only as far; each step judged so says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from arbitrage.core.policies import ArbitragePolicy, Policy
from arbitrage.core.ports import Models, StepRequest
from arbitrage.core.steps import GeneratedStep, Source, Verdict


@dataclass(frozen=True, slots=True)
class TargetPrice:
    """Tells the price of a target step, from 0 to 1, by the steps the target is writing now.

    It is 0 up to `capacity` steps, which the target writes well at once, 1 from twice as many, and
    rises evenly between. Without a capacity it is always 0.

    >>> [TargetPrice(4, lambda: count)() for count in (0, 4, 5, 6, 8, 100)]
    [0.0, 0.0, 0.25, 0.5, 1.0, 1.0]
    """

    capacity: int | None
    inflight_count: Callable[[], int]

    def __call__(self) -> float:
        """Returns the price."""
        if self.capacity is None:
            return 0.0
        return min(1.0, max(0.0, self.inflight_count() / self.capacity - 1.0))


@dataclass(frozen=True, slots=True)
class LoadPricedPolicy:
    """The `arbitrage` policy at a threshold that the price raises, at most to what was allowed.

    A threshold that lies above that already, as a router's own may, stays where it is.
    """

    name: ClassVar[str] = ArbitragePolicy.name
    first_writer: ClassVar[Source] = ArbitragePolicy.first_writer
    may_escalate: ClassVar[bool] = ArbitragePolicy.may_escalate
    entropy_token_count: ClassVar[int] = ArbitragePolicy.entropy_token_count
    inner: Policy
    max_escalation_threshold: float
    price: TargetPrice

    async def decide(self, request: StepRequest, draft: GeneratedStep, models: Models) -> Verdict:
        """Takes the verdict, and holds its score against the raised threshold."""
        verdict = await self.inner.decide(request, draft, models)
        score, base = verdict.router_score, verdict.threshold
        assert score is not None, "arbitrage judges by a score"
        assert base is not None, "and by a threshold"
        most = self.max_escalation_threshold
        price = self.price()
        # Exactly one of the two ends where the price is 0 or 1, and beyond neither by rounding.
        raised = min(most, max(base, (1.0 - price) * base + price * most))
        if raised <= base:
            return verdict
        return replace(
            verdict, escalate=score.value > raised, threshold=raised, is_load_priced=True
        )
