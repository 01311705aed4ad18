"""The models behind an orchestrator: their channels, and the ports a request sees them through."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import grpc.aio

from arbitrage.core.errors import (
    DraftUnavailable,
    ModelUnavailable,
    PrmUnavailable,
    RouterUnavailable,
    TargetUnavailable,
)
from arbitrage.core.policies import POLICIES
from arbitrage.core.ports import Generator, Models, Router, Scorer
from arbitrage.core.steps import Score, Trajectory
from arbitrage.v1 import generator_pb2
from services.orchestrator.cached_models import CachedGenerator, CachedScorer
from services.orchestrator.prefix_cache import PrefixCache
from services.orchestrator.settings import OrchestratorSettings
from services.orchestrator.telemetry import CountedTarget, RouterMetrics, TargetDemand
from services.rpc.clients import (
    GrpcGenerator,
    GrpcRouter,
    GrpcScorer,
    wait_until_serving,
)
from services.rpc.program import StartError

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
    def policies(self) -> tuple[str, ...]:
        """Names of the policies that these models allow."""
        absent: frozenset[str] = frozenset()
        if self.prm is None:
            absent |= _NEEDS_PRM
        if self.router is None:
            absent |= _NEEDS_ROUTER
        return tuple(policy.name for policy in POLICIES if policy.name not in absent)

    def for_request(self, deadline_s: float | None) -> Models:
        """Returns the ports of one request.

        `deadline_s` is the moment of the monotonic clock at which its time is over.
        """
        target: Generator = CountedTarget(self.target, self.demand, time.monotonic)
        draft: Generator = self.draft
        if self.cache is not None:
            draft = CachedGenerator(draft, self.cache, "draft")
            target = CachedGenerator(target, self.cache, "target")
        prm: Scorer = NoScorer()
        if self.prm is not None:
            prm = CachedScorer(self.prm.score_step, self.cache, "prm", deadline_s)
        router: Router = NoScorer()
        if self.router is not None:
            router = CachedScorer(self.router.estimate_advantage, self.cache, "router", deadline_s)
        return Models(draft, target, prm, router)


@asynccontextmanager
async def connected_models(
    settings: OrchestratorSettings,
    open_channel: Callable[[str], grpc.aio.Channel],
    cache: PrefixCache | None,
    demand: TargetDemand,
    router_metrics: RouterMetrics,
) -> AsyncIterator[RemoteModels]:
    """Opens a channel per role, and closes them on the way out.

    Returns once draft and target are serving; PRM and router may come later.

    Raises:
        StartError: draft and target do not end their steps with the same text.
    """
    limits = settings.call_limits
    async with AsyncExitStack() as stack:
        channels = {}
        for role in ("draft", "target", "prm", "router"):
            address = getattr(settings, f"{role}_address")
            if address is not None:
                channels[role] = await stack.enter_async_context(open_channel(address))
        router = None
        if "router" in channels:
            router = GrpcRouter(channels["router"], limits, router_metrics.count_truncated)
        models = RemoteModels(
            draft=GrpcGenerator(channels["draft"], DraftUnavailable, limits),
            target=GrpcGenerator(channels["target"], TargetUnavailable, limits),
            prm=GrpcScorer(channels["prm"], limits) if "prm" in channels else None,
            router=router,
            cache=cache,
            demand=demand,
        )
        async with asyncio.TaskGroup() as group:
            separators = {
                role: group.create_task(
                    _separator(
                        role, getattr(settings, f"{role}_address"), channels[role], generator
                    )
                )
                for role, generator in (("draft", models.draft), ("target", models.target))
            }
        draft, target = separators["draft"].result(), separators["target"].result()
        if draft != target:
            raise StartError(
                f"the draft at {settings.draft_address} ends its steps with {draft!r}, the target "
                f"at {settings.target_address} with {target!r}; deploy two generators that agree"
            )
        yield models


async def _separator(
    role: str, address: str, channel: grpc.aio.Channel, generator: GrpcGenerator
) -> str:
    """Waits until a generator is serving, and returns the text that ends its steps."""
    service = generator_pb2.DESCRIPTOR.services_by_name["GeneratorService"].full_name
    while True:
        await wait_until_serving(channel, service, f"the {role} at {address}")
        try:
            return await generator.separator()
        except ModelUnavailable as error:
            _log.warning("the %s at %s went away again: %s", role, address, error)
            await asyncio.sleep(_AGAIN_S)
