"""Answers a model has given before, found again by prefix; concurrent equal questions share one.

Whoever asks first makes the call and the others wait. Where the first gives up, the next takes
over; where its call fails, each of the others makes its own, so that nobody waits twice in vain.
"""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Final, Self

from arbitrage.core.errors import DeadlineExceeded
from arbitrage.core.ports import Clock
from services.orchestrator.digests import answer_key
from services.orchestrator.store import Store
from services.orchestrator.telemetry import CacheMetrics

# How long a role's revision is believed without the model having said it again. After that one
# call goes to the model even if the answer is known, so that a new model is noticed.
_REVISION_TRUST_S: Final = 30.0


class Flight:
    """One call to a model that others may be waiting for."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.answer: bytes | None = None
        self.has_failed = False


class Claim:
    """The right to make a call. Leaving it without an answer lets those who wait know."""

    def __init__(self, cache: PrefixCache, role: str, question: bytes, flight: Flight) -> None:
        self._cache = cache
        self._role = role
        self._question = question
        self._flight = flight

    async def keep(self, revision: str, answer: bytes) -> None:
        """Keeps the model's answer and hands it to those who wait for it."""
        self._flight.answer = answer
        self._leave()
        await self._cache.put(self._role, revision, self._question, answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A caller that goes away says nothing about the model; an error does.
        self._flight.has_failed = isinstance(error, Exception)
        self._leave()

    def _leave(self) -> None:
        self._cache.land(self._role, self._question, self._flight)
        self._flight.ended.set()


class PrefixCache:
    """Finds answers by role, model revision and question; keeps them in a store."""

    def __init__(
        self, store: Store, ttl_s: float, metrics: CacheMetrics, clock: Clock = time.monotonic
    ) -> None:
        self._store = store
        self._ttl_s = ttl_s
        self._metrics = metrics
        self._clock = clock
        self._revisions: dict[str, tuple[str, float]] = {}
        self._flights: dict[tuple[str, bytes], Flight] = {}

    async def find(
        self, role: str, question: bytes, deadline_s: float | None, *, may_be_shared: bool = True
    ) -> bytes | Claim:
        """Returns a known answer, or the claim to go and ask; waits for a call under way.

        With `may_be_shared`, others wait for the call that the claim is for.

        Raises:
            DeadlineExceeded: the calls under way did not end by `deadline_s`, a moment of the
                monotonic clock.
        """
        revision, said_s = self._revisions.get(role, ("", -_REVISION_TRUST_S))
        if self._clock() - said_s < _REVISION_TRUST_S:
            answer = await self._store.get(answer_key(role, revision, question))
            if answer is not None:
                self._metrics.count(role, "hit")
                return answer
        while (flight := self._flights.get((role, question))) is not None:
            await _wait(flight, deadline_s)
            if flight.answer is not None:
                self._metrics.count(role, "shared")
                return flight.answer
            if flight.has_failed:
                break
        self._metrics.count(role, "miss")
        flight = Flight()
        if may_be_shared:
            self._flights.setdefault((role, question), flight)
        return Claim(self, role, question, flight)

    async def put(self, role: str, revision: str, question: bytes, answer: bytes) -> None:
        """Keeps an answer under the revision that gave it."""
        self._revisions[role] = (revision, self._clock())
        await self._store.put(answer_key(role, revision, question), answer, self._ttl_s)

    def bypass(self, role: str) -> None:
        """Counts a call that is not for the cache."""
        self._metrics.count(role, "bypass")

    def land(self, role: str, question: bytes, flight: Flight) -> None:
        """Forgets a call under way, if it is the one that is known."""
        if self._flights.get((role, question)) is flight:
            del self._flights[role, question]


async def _wait(flight: Flight, deadline_s: float | None) -> None:
    wait_s = None if deadline_s is None else deadline_s - time.monotonic()
    try:
        async with asyncio.timeout(wait_s):
            await flight.ended.wait()
    except TimeoutError:
        raise DeadlineExceeded("the time limit was over before the step was") from None
