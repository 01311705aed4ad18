"""The orchestrators behind a gateway, and the connections to them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from arbitrage.channels import ClientTls
from arbitrage.client import AsyncArbitrageClient
from arbitrage.pem import Pem
from services.gateway.settings import GatewaySettings
from services.rpc.background import in_background
from services.rpc.settings import variable_of
from services.rpc.watched import WatchedFiles

_log = logging.getLogger(__name__)
_LOOK_INTERVAL_S: Final = 10.0


class Orchestrators:
    """Holds the client that all requests share."""

    def __init__(self, settings: GatewaySettings, files: WatchedFiles[Pem] | None) -> None:
        self.passes_keys_on = settings.passes_keys_on
        self._settings = settings
        self._files = files
        self.client = self._connected()

    async def follow_certificates(self) -> None:
        """Connects anew when the certificates change; what runs ends on the old connections."""
        while self._files is not None:
            await asyncio.sleep(_LOOK_INTERVAL_S)
            if await asyncio.to_thread(self._files.look):
                self.client = await asyncio.to_thread(self._connected)

    def _connected(self) -> AsyncArbitrageClient:
        settings = self._settings
        tls = None
        if settings.orchestrator_tls_ca is not None:
            tls = ClientTls(
                ca=settings.orchestrator_tls_ca,
                certificate=settings.orchestrator_tls_certificate,
                key=settings.orchestrator_tls_key,
            )
        return AsyncArbitrageClient(
            settings.orchestrator_address,
            tls=tls,
            allow_plaintext_key=settings.allow_plaintext_keys,
        )


@asynccontextmanager
async def connected_orchestrators(
    settings: GatewaySettings, on_failed_reload: Callable[[], None]
) -> AsyncIterator[Orchestrators]:
    """Connects to the orchestrators that the settings name, when the first request comes.

    Raises:
        TlsError: a file cannot be used.
    """
    files = None
    if settings.orchestrator_tls is not None:
        files = await asyncio.to_thread(settings.orchestrator_tls.watched, on_failed_reload)
    if not settings.passes_keys_on:
        _log.warning(
            "%s is reached in plaintext, so callers' API keys are not passed on; set %s, or %s "
            "where the network is trusted",
            settings.orchestrator_address,
            variable_of("orchestrator_tls_ca"),
            variable_of("allow_plaintext_keys"),
        )
    orchestrators = await asyncio.to_thread(Orchestrators, settings, files)
    try:
        async with in_background(orchestrators.follow_certificates()):
            yield orchestrators
    finally:
        await orchestrators.client.close()
