"""The model services a run asks: those of a deployment, or a pack's, started for the run."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from arbitrage.core.errors import ArbitrageError, DraftUnavailable, TargetUnavailable
from arbitrage.core.ports import Models
from arbitrage.core.steps import ModelIdentity
from arbitrage.pem import Pem, PemError, read_pem
from router_training.config import Services
from router_training.errors import ServiceFailed
from services.cli.failures import CommandError
from services.cli.fleet import running_fleet
from services.cli.plan import ANY_PORTS, MODEL_ROLES, FleetPlan
from services.engines.pack_manifest import PackError
from services.engines.packs import find_pack
from services.rpc.calls import CallLimits
from services.rpc.clients import GrpcGenerator, GrpcRouter, GrpcScorer
from services.rpc.pool import opened_pool
from services.rpc.tls import ChannelOpener
from services.rpc.watched import WatchedFiles

_MAX_MESSAGE_MIB: Final = 16


@dataclass(frozen=True, slots=True)
class Connection:
    """The models behind the services, who they are, and the router where there is one."""

    models: Models
    draft: ModelIdentity
    target: ModelIdentity
    prm: ModelIdentity
    router: GrpcRouter | None


class _NoRouter:
    """Stands where no router is deployed; nobody asks it."""

    async def estimate_advantage(self, *_: object) -> object:
        raise AssertionError("a prefix policy asked a router that is not there")


@asynccontextmanager
async def connected(services: Services) -> AsyncIterator[Connection]:
    """Connects to the services, after starting them where a pack is named.

    Raises:
        ServiceFailed: naming the service, its address and the fix.
    """
    async with AsyncExitStack() as stack:
        addresses = await stack.enter_async_context(_addresses(services))
        opener = await asyncio.to_thread(_channel_opener, services)
        limits = CallLimits(services.call_timeout_s, grace_s=10.0)
        pools = {
            role: await stack.enter_async_context(opened_pool(role, address, opener))
            for role, address in addresses.items()
        }
        draft = GrpcGenerator(pools["draft"], DraftUnavailable, limits)
        target = GrpcGenerator(pools["target"], TargetUnavailable, limits)
        prm = GrpcScorer(pools["prm"], limits)
        router = GrpcRouter(pools["router"], limits) if "router" in pools else None
        try:
            draft_model = await draft.describe()
            target_model = await target.describe()
            prm_model = await prm.describe()
        except ArbitrageError as error:
            listed = ", ".join(f"{role} {address}" for role, address in addresses.items())
            raise ServiceFailed(
                f"services: {error}; is it running? ({listed}); correct [services] or start it"
            ) from None
        yield Connection(
            Models(draft, target, prm, router or _NoRouter()),  # type: ignore[arg-type]  # never asked
            draft_model,
            target_model,
            prm_model,
            router,
        )


def _channel_opener(services: Services) -> ChannelOpener:
    """Opens channels as the services want them; files that are renewed count.

    Raises:
        ServiceFailed: a file cannot be used.
    """
    if services.tls_ca is None:
        return ChannelOpener(_MAX_MESSAGE_MIB)
    files = (services.tls_ca, services.tls_certificate, services.tls_key)

    def read() -> Pem:
        try:
            return read_pem(*files)
        except PemError as error:
            raise ServiceFailed(f"services.tls_{error.part}: {error}") from None

    paths = tuple(path for path in files if path is not None)
    return ChannelOpener(_MAX_MESSAGE_MIB, WatchedFiles(paths, read, lambda: None))


@asynccontextmanager
async def _addresses(services: Services) -> AsyncIterator[Mapping[str, str]]:
    if services.pack is None:
        named = {role: getattr(services, role) for role in MODEL_ROLES}
        yield {role: address for role, address in named.items() if address is not None}
        return
    try:
        pack = find_pack(services.pack)
        plan = FleetPlan(pack, ANY_PORTS, prefix_cache_mib=0, device=services.device)
        with tempfile.TemporaryDirectory(prefix="arbitrage-training-") as folder:
            async with running_fleet(plan, Path(folder)) as fleet:
                yield {role: fleet.services[role].address for role in MODEL_ROLES}
    except (PackError, CommandError) as error:
        raise ServiceFailed(f"services.pack: {error}") from None
