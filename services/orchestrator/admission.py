"""Lets in as many requests as can run well, keeps a few waiting, and refuses the rest at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from arbitrage.core.errors import DeadlineExceeded, Overloaded

_RECENT_WEIGHT = 0.2
_LEAST_RETRY_S = 0.1
_LONGEST_RETRY_S = 60.0


class Admission:
    """Bounds how many requests run and how many wait.

    Those that wait are let in in the order they came.
    """

    def __init__(self, max_concurrency: int, max_queue: int) -> None:
        self._places = asyncio.Semaphore(max_concurrency)
        self._max_concurrency = max_concurrency
        self._max_queue = max_queue
        self._mean_s = 1.0
        self.waiting_count = 0
        self.running_count = 0

    @asynccontextmanager
    async def place(self, deadline_s: float | None = None) -> AsyncIterator[None]:
        """Waits for a place and holds it; `deadline_s` is a moment of the monotonic clock.

        Raises:
            DeadlineExceeded: there was no place by then.
            Overloaded: as many as may are waiting already; says when one of them will be gone.
        """
        if self._places.locked() and self.waiting_count >= self._max_queue:
            raise Overloaded(
                f"{self.running_count} requests are running and {self.waiting_count} waiting; "
                "come back later, or raise ARBITRAGE_MAX_CONCURRENCY or ARBITRAGE_MAX_QUEUE",
                retry_after_s=self._retry_after_s(),
            )
        self.waiting_count += 1
        try:
            wait_s = None if deadline_s is None else deadline_s - time.monotonic()
            async with asyncio.timeout(wait_s):
                await self._places.acquire()
        except TimeoutError:
            raise DeadlineExceeded("the time limit was over before there was a place") from None
        finally:
            self.waiting_count -= 1
        started_s = time.monotonic()
        self.running_count += 1
        try:
            yield
        finally:
            self.running_count -= 1
            self._places.release()
            took_s = time.monotonic() - started_s
            self._mean_s += _RECENT_WEIGHT * (took_s - self._mean_s)

    def _retry_after_s(self) -> float:
        turns = (self.waiting_count + 1) / self._max_concurrency
        return min(_LONGEST_RETRY_S, max(_LEAST_RETRY_S, turns * self._mean_s))
