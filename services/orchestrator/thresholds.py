"""Finds the threshold of a request that leaves it to the router."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, Protocol

from arbitrage.core.errors import DeadlineExceeded, RouterUnavailable
from arbitrage.core.policies import ArbitragePolicy, Policy
from arbitrage.core.ports import Models, RouterDescription, StepRequest
from arbitrage.core.speculation import RouterFallback
from arbitrage.core.steps import GeneratedStep, Source, Verdict
from services.orchestrator.requests import RouterThreshold


class DescribedRouter(Protocol):
    """Says what router it is."""

    async def describe(self, deadline_s: float | None = None) -> RouterDescription:
        """Returns the description; `deadline_s` is a moment of the monotonic clock.

        Raises:
            DeadlineExceeded, RouterUnavailable
        """
        ...


@dataclass(frozen=True, slots=True)
class LateThresholdPolicy:
    """The `arbitrage` policy while its router cannot be reached: it asks again at every step.

    Where it still cannot, `RouterUnavailable` makes the loop fall back and flag the step.
    """

    name: ClassVar[str] = ArbitragePolicy.name
    first_writer: ClassVar[Source] = ArbitragePolicy.first_writer
    may_escalate: ClassVar[bool] = ArbitragePolicy.may_escalate
    entropy_token_count: ClassVar[int] = ArbitragePolicy.entropy_token_count
    wanted: RouterThreshold
    router: DescribedRouter

    async def decide(self, request: StepRequest, draft: GeneratedStep, models: Models) -> Verdict:
        """Decides as `ArbitragePolicy` does once the router has told its threshold."""
        limit_s = request.time_limit_s
        deadline_s = None if limit_s is None else time.monotonic() + limit_s
        policy = self.wanted.policy(await self.router.describe(deadline_s))
        return await policy.decide(request, draft, models)


async def settled_policy(
    wanted: Policy | RouterThreshold,
    router: DescribedRouter | None,
    fallback: RouterFallback,
    deadline_s: float | None,
) -> Policy:
    """Returns the policy a request runs under, its threshold found.

    `deadline_s` is the moment of the monotonic clock at which the request's time is over.

    Raises:
        CalibrationUnavailable: a target share was asked for and the router has no table.
        RouterUnavailable: it cannot be reached, and the fallback is to fail.
    """
    if not isinstance(wanted, RouterThreshold):
        return wanted
    assert router is not None, "the policy is not offered without a router"
    try:
        return wanted.policy(await router.describe(deadline_s))
    except DeadlineExceeded:
        # The loop ends a request without time at its first step.
        return LateThresholdPolicy(wanted, router)
    except RouterUnavailable:
        if fallback is RouterFallback.FAIL:
            raise
        return LateThresholdPolicy(wanted, router)
