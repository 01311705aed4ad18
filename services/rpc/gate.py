"""Says whether calls may come in, and knows how many are inside."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from arbitrage.core.errors import NotServing

_log = logging.getLogger(__name__)
# What calls past the grace get for sending their last status and ending.
FLUSH_GRACE_S = 1.0


class Gate:
    """Closed while the server starts, open while it serves, closed again while it ends."""

    def __init__(self) -> None:
        self._refusal: str | None = "the server is starting; try again soon"
        # The patience with each call inside; it has no end until the server's grace is over.
        self._inside: set[asyncio.Timeout] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def is_open(self) -> bool:
        """Whether calls may come in."""
        return self._refusal is None

    def open(self) -> None:
        """Lets calls in."""
        self._refusal = None

    def close(self) -> None:
        """Lets no further call in; those inside go on."""
        self._refusal = "the server is stopping; call another one"

    @asynccontextmanager
    async def passed(self) -> AsyncIterator[None]:
        """Holds one call's place inside.

        Raises:
            NotServing: the gate is closed, or the call was put out.
        """
        if self._refusal is not None:
            raise NotServing(self._refusal)
        patience = asyncio.timeout(None)
        try:
            async with patience:
                self._inside.add(patience)
                self._empty.clear()
                try:
                    yield
                finally:
                    self._inside.discard(patience)
        except TimeoutError:
            if not patience.expired():
                raise
            raise NotServing("the server stopped before the call ended; call another one") from None
        finally:
            if not self._inside:
                self._empty.set()

    async def drain(self, grace_s: float) -> None:
        """Lets no further call in, and those inside end; those past the grace are put out."""
        self.close()
        if not await self.wait_until_empty(grace_s):
            _log.warning("calls still running after %g s are cancelled", grace_s)
            self.put_out()
            await self.wait_until_empty(FLUSH_GRACE_S)

    def put_out(self) -> None:
        """Cancels the calls inside, each of which ends with `NotServing`."""
        for patience in self._inside:
            if not patience.expired():
                patience.reschedule(asyncio.get_running_loop().time())

    async def wait_until_empty(self, timeout_s: float) -> bool:
        """Waits for the calls inside; returns whether all of them ended in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True
