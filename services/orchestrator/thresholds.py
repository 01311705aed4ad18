"""Finds the threshold of a request that leaves it to the router."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, Protocol

from arbitrage.core.errors import CalibrationUnavailable, DeadlineExceeded, RouterUnavailable
from arbitrage.core.policies import ArbitragePolicy, Policy
from arbitrage.core.ports import Models, RouterDescription, StepRequest
from arbitrage.core.speculation import RouterFallback
from arbitrage.core.steps import GeneratedStep, ModelIdentity, Source, Verdict
from services.orchestrator.requests import RouterThreshold


class DescribedRouter(Protocol):
    """Says what router it is."""

    async def describe(self, deadline_s: float | None = None) -> RouterDescription:
        """Returns the description; `deadline_s` is a moment of the monotonic clock.

        Raises:
            DeadlineExceeded, RouterUnavailable
        """
        ...

    async def describe_model(
        self, model: ModelIdentity, deadline_s: float | None = None
    ) -> RouterDescription:
        """Returns the description of the very weights that gave a score.

        Raises:
            DeadlineExceeded, RouterUnavailable: also where they are gone and were never described.
        """
        ...


@dataclass(frozen=True, slots=True)
class RouterThresholdPolicy:
    """The `arbitrage` policy at the threshold of whichever router scored the step.

    Routers are replaced while solutions run, and a threshold means nothing to another router's
    scores. Where the router cannot be reached, `RouterUnavailable` makes the loop fall back and
    flag the step; the next step asks again.
    """

    name: ClassVar[str] = ArbitragePolicy.name
    first_writer: ClassVar[Source] = ArbitragePolicy.first_writer
    may_escalate: ClassVar[bool] = ArbitragePolicy.may_escalate
    entropy_token_count: ClassVar[int] = ArbitragePolicy.entropy_token_count
    wanted: RouterThreshold
    router: DescribedRouter

    async def decide(self, request: StepRequest, draft: GeneratedStep, models: Models) -> Verdict:
        """Asks the router for its score, and for the threshold that goes with it."""
        limit_s = request.time_limit_s
        deadline_s = None if limit_s is None else time.monotonic() + limit_s
        # Before the score: a router that does not answer is asked for nothing more.
        await self.router.describe(deadline_s)
        score = await models.router.estimate_advantage(request.trajectory, draft.text)
        described = await self.router.describe_model(score.model, deadline_s)
        try:
            threshold = self.wanted.policy(described).escalation_threshold
        except CalibrationUnavailable as error:
            # The router it began with had a table; the one that replaced it cannot fail it now.
            raise RouterUnavailable(str(error)) from None
        return Verdict(escalate=score.value > threshold, router_score=score, threshold=threshold)


async def settled_policy(
    wanted: Policy | RouterThreshold,
    router: DescribedRouter | None,
    fallback: RouterFallback,
    deadline_s: float | None,
) -> Policy:
    """Returns the policy a request runs under.

    A threshold that only the router can tell is looked for once, so that a request that cannot
    have one is refused before it costs anything. `deadline_s` is the moment of the monotonic clock
    at which the request's time is over.

    Raises:
        CalibrationUnavailable: a target share was asked for and the router has no table.
        RouterUnavailable: it cannot be reached, and the fallback is to fail.
    """
    if not isinstance(wanted, RouterThreshold):
        return wanted
    assert router is not None, "the policy is not offered without a router"
    try:
        wanted.policy(await router.describe(deadline_s))
    except DeadlineExceeded:
        # The loop ends a request without time at its first step.
        pass
    except RouterUnavailable:
        if fallback is RouterFallback.FAIL:
            raise
    return RouterThresholdPolicy(wanted, router)
