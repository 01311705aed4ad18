"""The models behind an orchestrator: their channels, and the ports a request sees them through."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from arbitrage.core.errors import (
    DraftUnavailable,
    ModelUnavailable,
    PrmUnavailable,
    RouterUnavailable,
    TargetUnavailable,
)
from arbitrage.core.policies import POLICIES
from arbitrage.core.ports import Generator, Models, Router, Scorer
from arbitrage.core.steps import ModelIdentity, Score, Source, Trajectory
from arbitrage.v1 import generator_pb2
from services.orchestrator.cached_models import CachedGenerator, CachedScorer, OwnSteps
from services.orchestrator.prefix_cache import PrefixCache
from services.orchestrator.settings import OrchestratorSettings
from services.orchestrator.telemetry import CountedTarget, RouterMetrics, TargetDemand
from services.rpc.background import in_background
from services.rpc.clients import GrpcGenerator, GrpcRouter, GrpcScorer
from services.rpc.pool import Pool, opened_pool
from services.rpc.program import StartError
from services.rpc.telemetry import ROLES, PoolMetrics
from services.rpc.tls import ChannelOpener

_log = logging.getLogger(__name__)
_AGAIN_S = 0.5
_NEEDS_PRM = frozenset({"rsd", "oracle"})
_NEEDS_ROUTER = frozenset({"arbitrage"})


class NoScorer:
    """Stands where a deployment has no PRM or no router; no policy that is offered asks it."""

    async def score_step(self, trajectory: Trajectory, step_text: str) -> Score:
        """Says that there is nobody."""
        raise PrmUnavailable("this deployment has no PRM; set ARBITRAGE_PRM_ADDRESS")

    async def estimate_advantage(self, trajectory: Trajectory, draft_text: str) -> Score:
        """Says that there is nobody."""
        raise RouterUnavailable("this deployment has no router; set ARBITRAGE_ROUTER_ADDRESS")


@dataclass(frozen=True, slots=True)
class RemoteModels:
    """The models over gRPC. PRM and router may be absent."""

    draft: GrpcGenerator
    target: GrpcGenerator
    prm: GrpcScorer | None
    router: GrpcRouter | None
    cache: PrefixCache | None
    demand: TargetDemand

    @property
    def describes(self) -> Mapping[str, Callable[[], Awaitable[ModelIdentity]]]:
        """How each role's model is asked what it is."""
        asked: dict[str, Callable[[], Awaitable[ModelIdentity]]] = {
            "draft": self.draft.describe,
            "target": self.target.describe,
        }
        if self.prm is not None:
            asked["prm"] = self.prm.describe
        if (router := self.router) is not None:

            async def describe_router() -> ModelIdentity:
                return (await router.ask_description()).model

            asked["router"] = describe_router
        return asked

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the policies that these models allow."""
        absent: frozenset[str] = frozenset()
        if self.prm is None:
            absent |= _NEEDS_PRM
        if self.router is None:
            absent |= _NEEDS_ROUTER
        return tuple(policy.name for policy in POLICIES if policy.name not in absent)

    def for_request(self, deadline_s: float | None, *, is_cacheable: bool = True) -> Models:
        """Returns the ports of one request; `is_cacheable` says whether its steps are to be kept.

        `deadline_s` is the moment of the monotonic clock at which its time is over.
        """
        target: Generator = CountedTarget(self.target, self.demand, time.monotonic)
        draft: Generator = self.draft
        own = OwnSteps()
        if self.cache is not None:
            draft = CachedGenerator(draft, self.cache, Source.DRAFT, own, is_cacheable)
            target = CachedGenerator(target, self.cache, Source.TARGET, own, is_cacheable)
        prm: Scorer = NoScorer()
        if self.prm is not None:
            prm = CachedScorer(self.prm.score_step, self.cache, "prm", own, deadline_s)
        router: Router = NoScorer()
        if self.router is not None:
            ask = self.router.estimate_advantage
            router = CachedScorer(ask, self.cache, "router", own, deadline_s)
        return Models(draft, target, prm, router)


@asynccontextmanager
async def connected_models(
    settings: OrchestratorSettings,
    opener: ChannelOpener,
    cache: PrefixCache | None,
    demand: TargetDemand,
    router_metrics: RouterMetrics,
    pool_metrics: PoolMetrics,
) -> AsyncIterator[RemoteModels]:
    """Opens a pool per role, and closes them on the way out.

    Returns once draft and target are serving; PRM and router may come later.

    Raises:
        StartError: draft and target do not end their steps with the same text.
    """
    limits = settings.call_limits
    async with AsyncExitStack() as stack:
        pools = {}
        for role in ROLES:
            address = getattr(settings, f"{role}_address")
            if address is not None:
                opened = opened_pool(
                    role,
                    address,
                    opener,
                    pool_metrics,
                    settings.resolve_interval_s,
                    settings.hedge_quantile,
                )
                pools[role] = await stack.enter_async_context(opened)
        renewing = _renew_channels(opener, pools.values(), settings.resolve_interval_s)
        await stack.enter_async_context(in_background(renewing))
        router = None
        if "router" in pools:
            router = GrpcRouter(pools["router"], limits, router_metrics.count_truncated)
        models = RemoteModels(
            draft=GrpcGenerator(pools["draft"], DraftUnavailable, limits),
            target=GrpcGenerator(pools["target"], TargetUnavailable, limits),
            prm=GrpcScorer(pools["prm"], limits) if "prm" in pools else None,
            router=router,
            cache=cache,
            demand=demand,
        )
        async with asyncio.TaskGroup() as group:
            separators = {
                role: group.create_task(_separator(pools[role], generator))
                for role, generator in (("draft", models.draft), ("target", models.target))
            }
        draft, target = separators["draft"].result(), separators["target"].result()
        if draft != target:
            raise StartError(
                f"the draft at {settings.draft_address} ends its steps with {draft!r}, the target "
                f"at {settings.target_address} with {target!r}; deploy two generators that agree"
            )
        yield models


async def _renew_channels(
    opener: ChannelOpener, pools: Collection[Pool], interval_s: float
) -> None:
    """Opens every channel anew whenever the certificates have changed, until it is cancelled."""
    while True:
        await asyncio.sleep(interval_s)
        if await asyncio.to_thread(opener.changed):
            for pool in pools:
                await pool.resolve(anew=True)


async def _separator(pool: Pool, generator: GrpcGenerator) -> str:
    """Waits until a generator is serving, and returns the text that ends its steps."""
    service = generator_pb2.DESCRIPTOR.services_by_name["GeneratorService"].full_name
    while True:
        await pool.wait_until_serving(service)
        try:
            return await generator.separator()
        except ModelUnavailable as error:
            _log.warning("the %s at %s went away again: %s", pool.role, pool.address, error)
            await asyncio.sleep(_AGAIN_S)
