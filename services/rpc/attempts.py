"""One replica's work on a question, of which there may be two at once."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable
from typing import Any

import grpc.aio

from services.rpc.pool import Replica


class Attempt:
    """One replica at work on a question, until it is ended."""

    def __init__(self, replica: Replica, rpc: Any) -> None:
        self.replica = replica
        self.began_s = time.monotonic()
        self.has_answered = False
        self.failure: grpc.aio.AioRpcError | None = None
        self._rpc = rpc
        self._first: Any = None
        self._is_ended = False
        replica.inflight_count += 1

    @property
    def is_waited_for(self) -> bool:
        """Whether neither an answer nor a failure has come yet."""
        return not self.has_answered and self.failure is None

    async def wait(self) -> None:
        """Waits until its first message has come, or its failure."""
        try:
            self._first = await self._next()
            self.has_answered = True
        except grpc.aio.AioRpcError as error:
            self.failure = error

    async def read(self) -> Any:
        """Returns its next message, after `wait`; None behind the last one of a stream.

        Raises:
            grpc.aio.AioRpcError
        """
        if self.failure is not None:
            raise self.failure
        first, self._first = self._first, None
        return await self._next() if first is None else first

    def end(self) -> None:
        """Cancels what it still does."""
        if not self._is_ended:
            self._is_ended = True
            self._rpc.cancel()
            self.replica.inflight_count -= 1

    async def _next(self) -> Any:
        if isinstance(self._rpc, AsyncIterable):
            return await anext(aiter(self._rpc), None)
        return await self._rpc
