"""The running system a benchmark measures: the shipped pack, every service a process, real gRPC."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from arbitrage.core.errors import DraftUnavailable, TargetUnavailable
from arbitrage.core.ports import Models
from services.cli import fleet as processes
from services.cli.plan import ANY_PORTS, FleetPlan
from services.engines.pack_manifest import Pack
from services.engines.packs import find_pack
from services.rpc.clients import GrpcGenerator, GrpcRouter, GrpcScorer
from services.rpc.pool import Pool, opened_pool

PACK = "tiny"


@dataclass(frozen=True, slots=True)
class Fleet:
    """Addresses of the running services by name, and the pack they serve."""

    pack: Pack
    addresses: Mapping[str, str]


@asynccontextmanager
async def running_fleet(
    pack: Pack | None = None,
    device: str = "cpu",
    *,
    threads: int = 1,
    extra: Mapping[str, Mapping[str, str]] | None = None,
) -> AsyncIterator[Fleet]:
    """Starts every service on free ports, the orchestrator's prefix cache off, and stops them.

    `extra` holds further variables by service name.
    """
    pack = pack or find_pack(PACK)
    # A cached step costs nothing, so arms that share steps would flatter each other.
    plan = FleetPlan(
        pack, ANY_PORTS, threads=threads, prefix_cache_mib=0, device=device, extra=extra or {}
    )
    with tempfile.TemporaryDirectory(prefix="arbitrage-benchmark-") as folder:
        async with processes.running_fleet(plan, Path(folder)) as running:
            addresses = {name: service.address for name, service in running.services.items()}
            yield Fleet(pack, addresses)


@asynccontextmanager
async def connected_models(fleet: Fleet) -> AsyncIterator[tuple[Models, GrpcRouter]]:
    """Connects to the four model services, for a benchmark that runs the loop itself."""
    async with AsyncExitStack() as stack:

        async def pool(role: str) -> Pool:
            return await stack.enter_async_context(opened_pool(role, fleet.addresses[role]))

        router = GrpcRouter(await pool("router"))
        models = Models(
            draft=GrpcGenerator(await pool("draft"), DraftUnavailable),
            target=GrpcGenerator(await pool("target"), TargetUnavailable),
            prm=GrpcScorer(await pool("prm")),
            router=router,
        )
        yield models, router
