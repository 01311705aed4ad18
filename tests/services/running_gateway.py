"""A real gateway on a free port, in the test's process, and clients for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
from openai import AsyncOpenAI

from services.gateway.__main__ import build
from services.gateway.server import HttpServer
from services.gateway.settings import GatewaySettings
from services.rpc.auth import Anyone
from services.rpc.telemetry import Telemetry


@dataclass
class Gateway:
    """A gateway that serves: its URL, its server and its metrics."""

    url: str
    server: HttpServer
    telemetry: Telemetry

    def count(self, route: str, status: int) -> float | None:
        """Returns how many requests of a route ended with a status."""
        labels = {"route": route, "status": str(status)}
        return self.telemetry.registry.get_sample_value("arbitrage_http_requests_total", labels)

    async def post(self, body: Any, **options: Any) -> httpx2.Response:
        """Returns the answer to a chat completion, given as JSON or as bytes."""
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        async with httpx2.AsyncClient(timeout=60) as client:
            return await client.post(f"{self.url}/v1/chat/completions", **content, **options)

    async def get(self, path: str) -> httpx2.Response:
        """Returns the answer to a GET."""
        async with httpx2.AsyncClient(timeout=60) as client:
            return await client.get(f"{self.url}{path}")

    def openai(self, api_key: str = "none") -> AsyncOpenAI:
        """Returns OpenAI's own client."""
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0)


@asynccontextmanager
async def running_gateway(orchestrator_address: str, **settings: Any) -> AsyncIterator[Gateway]:
    """Serves in front of an orchestrator until the block is left."""
    given = {"port": 0, "orchestrator_address": orchestrator_address, **settings}
    telemetry = Telemetry()
    checked = GatewaySettings(**given)
    server = HttpServer(checked, telemetry)
    await server.start()
    try:
        async with build(checked, telemetry) as servicer:
            await server.open(servicer, Anyone())
            yield Gateway(f"http://{server.address}", server, telemetry)
            await server.drain(0.1)
    finally:
        await server.stop()
