"""A client of orchestrators that one name stands for."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from arbitrage.client import AsyncArbitrageClient
from arbitrage.v1 import orchestrator_pb2 as api
from services.rpc.server import Listener, RpcServer
from services.rpc.telemetry import Telemetry
from tests.services.name_server import dns_server
from tests.services.running import ORCHESTRATOR


class CallCounter:
    """Counts who asks what it can do."""

    def __init__(self) -> None:
        self.count = 0

    async def GetCapabilities(  # noqa: N802 - gRPC's name
        self, request: api.GetCapabilitiesRequest, context: object
    ) -> api.GetCapabilitiesResponse:
        """Answers with nothing."""
        self.count += 1
        return api.GetCapabilitiesResponse()


async def test_all_that_a_name_stands_for_are_asked_and_those_that_come_later_too() -> None:
    hosts = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    servicers = [CallCounter() for _ in hosts]
    async with AsyncExitStack() as stack:
        servers = [
            RpcServer(ORCHESTRATOR, Listener(hosts[0], 0, connection_age_s=0.2), Telemetry())
        ]
        await servers[0].start()
        port = servers[0].port
        for host in hosts[1:]:
            servers.append(
                RpcServer(ORCHESTRATOR, Listener(host, port, connection_age_s=0.2), Telemetry())
            )
            await servers[-1].start()
        for server, servicer in zip(servers, servicers, strict=True):
            stack.push_async_callback(server.stop)
            await server.open(servicer)
        known = hosts[:2]
        name_server = await stack.enter_async_context(dns_server(lambda: known))
        address = f"dns://{name_server}/orchestrators.test:{port}"
        client = await stack.enter_async_context(AsyncArbitrageClient(address))
        async with asyncio.timeout(60):
            while not all(servicer.count for servicer in servicers[:2]):
                await client.capabilities()
            assert servicers[2].count == 0
            known = hosts
            while not servicers[2].count:
                await client.capabilities()
                await asyncio.sleep(0.05)
