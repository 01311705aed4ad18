"""`python -m services.gateway`: settings, connections, servicer, serve."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.gateway.orchestrators import connected_orchestrators
from services.gateway.server import HttpServer
from services.gateway.servicer import GatewayServicer
from services.gateway.settings import GatewaySettings
from services.rpc.program import Program, main
from services.rpc.telemetry import Telemetry


@asynccontextmanager
async def build(settings: GatewaySettings, telemetry: Telemetry) -> AsyncIterator[GatewayServicer]:
    """Makes the servicer. Orchestrators may come later; until then requests get 503."""
    on_failed_reload = telemetry.failed_reloads.of("orchestrator_tls")
    async with connected_orchestrators(settings, on_failed_reload) as orchestrators:
        yield GatewayServicer(orchestrators)


GATEWAY = Program(
    component="gateway",
    server=HttpServer,
    settings=GatewaySettings,
    build=build,
)

if __name__ == "__main__":
    sys.exit(main(GATEWAY))
