"""The orchestrators behind a gateway, and the connections to them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from arbitrage.channels import ClientTls
from arbitrage.client import AsyncArbitrageClient
from services.gateway.settings import GatewaySettings
from services.rpc.background import in_background
from services.rpc.settings import variable_of
from services.rpc.watched import WatchedFiles

_log = logging.getLogger(__name__)


class Orchestrators:
    """Holds the client that all requests share.

    There is another one when the certificates change; what runs ends on the old connections.

    Raises:
        TlsError: a file cannot be used.
    """

    def __init__(self, settings: GatewaySettings, on_failed_reload: Callable[[], None]) -> None:
        self.passes_keys_on = settings.passes_keys_on
        self._settings = settings
        self._files = settings.orchestrator_tls
        paths = () if self._files is None else self._files.paths
        self._watched = WatchedFiles(paths, self._connected, on_failed_reload)

    @property
    def client(self) -> AsyncArbitrageClient:
        """The one for new requests."""
        return self._watched.value

    async def follow_certificates(self) -> None:
        """Looks whether they have changed, until it is cancelled."""
        await self._watched.follow()

    def _connected(self) -> AsyncArbitrageClient:
        return AsyncArbitrageClient(
            self._settings.orchestrator_address,
            tls=None if self._files is None else ClientTls.of(self._files.read()),
            allow_plaintext_key=self._settings.allow_plaintext_keys,
        )


@asynccontextmanager
async def connected_orchestrators(
    settings: GatewaySettings, on_failed_reload: Callable[[], None]
) -> AsyncIterator[Orchestrators]:
    """Connects to the orchestrators that the settings name, when the first request comes.

    Raises:
        TlsError: a file cannot be used.
    """
    if not settings.passes_keys_on:
        _log.warning(
            "%s is reached in plaintext, so callers' API keys are not passed on; set %s, or %s "
            "where the network is trusted",
            settings.orchestrator_address,
            variable_of("orchestrator_tls_ca"),
            variable_of("allow_plaintext_keys"),
        )
    orchestrators = await asyncio.to_thread(Orchestrators, settings, on_failed_reload)
    try:
        async with in_background(orchestrators.follow_certificates()):
            yield orchestrators
    finally:
        await orchestrators.client.close()
