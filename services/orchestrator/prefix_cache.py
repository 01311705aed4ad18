"""Answers a model has given before, found again by prefix; concurrent equal questions share one.

Whoever asks first makes the call and the others wait, within an orchestrator and, through the
store, among orchestrators. Where the first gives up, the next takes over; where its call fails,
each of the others makes its own, so that nobody waits twice in vain.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Final, Self

from arbitrage.core.errors import ArbitrageError, DeadlineExceeded
from arbitrage.core.ports import Clock
from arbitrage.core.steps import ModelIdentity
from services.orchestrator.digests import answer_key
from services.orchestrator.store import Store
from services.orchestrator.telemetry import CacheMetrics

# How long a role's revision is believed without the model having said it again. After that one
# call goes to the model even if the answer is known, so that a new model is noticed.
_REVISION_TRUST_S: Final = 30.0
# How often every model is asked what it is.
_REVISION_INTERVAL_S: Final = 2.0
# How often the store is asked whether another orchestrator has its answer: ever more slowly.
_FIRST_LOOK_S: Final = 0.01
_LONGEST_LOOK_S: Final = 0.1


class Flight:
    """One call to a model that others may be waiting for."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.answer: bytes | None = None
        self.has_failed = False


class Claim:
    """The right to make a call. Leaving it without an answer lets those who wait know.

    `store_key` is what other orchestrators wait for, if the call is shared with them.
    """

    def __init__(
        self,
        cache: PrefixCache,
        role: str,
        question: bytes,
        flight: Flight,
        store_key: bytes | None,
    ) -> None:
        self._cache = cache
        self._role = role
        self._question = question
        self._flight = flight
        self._store_key = store_key

    def keep(self, revision: str, answer: bytes) -> None:
        """Keeps the model's answer and hands it to those who wait for it."""
        self.answered(answer)
        kept_as = self._cache.put(self._role, revision, self._question, answer)
        if kept_as == self._store_key:
            # Keeping it has ended the claim in the store.
            self._store_key = None

    def answered(self, answer: bytes) -> None:
        """Hands an answer to those who wait for it."""
        self._flight.answer = answer
        self._land()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A caller that goes away, or has no time left, says nothing about the model; an error does.
        self._flight.has_failed = isinstance(error, Exception) and not isinstance(
            error, DeadlineExceeded
        )
        self._land()
        if self._store_key is not None:
            self._cache.release(self._store_key)

    def _land(self) -> None:
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
        self,
        role: str,
        question: bytes,
        deadline_s: float | None,
        *,
        may_be_shared: bool = True,
        is_new: bool = False,
    ) -> bytes | Claim:
        """Returns a known answer, or the claim to go and ask; waits for a call under way.

        With `may_be_shared`, others wait for the call that the claim is for. Where the question
        `is_new`, so that nobody can have an answer, the store is not waited for.

        Raises:
            DeadlineExceeded: the calls under way did not end by `deadline_s`, a moment of the
                monotonic clock.
        """
        while (flight := self._flights.get((role, question))) is not None:
            await _wait(flight, deadline_s)
            if flight.answer is not None:
                self._metrics.count(role, "shared")
                return flight.answer
            if flight.has_failed:
                # Everybody for himself now, in every orchestrator.
                may_be_shared = False
                break
        revision, flight = self._revision(role), Flight()
        key = None if revision is None else answer_key(role, revision, question)
        claim = Claim(self, role, question, flight, key if may_be_shared else None)
        if may_be_shared:
            self._flights[role, question] = flight
        if is_new:
            if may_be_shared and key is not None:
                self._store.claim_unseen(key)
            self._metrics.count(role, "miss")
            return claim
        try:
            answer, result = await self._look_up(key, deadline_s, may_be_shared=may_be_shared)
        except BaseException as error:
            await claim.__aexit__(type(error), error, None)
            raise
        self._metrics.count(role, result)
        if answer is None:
            return claim
        claim.answered(answer)
        return answer

    async def _look_up(
        self, key: bytes | None, deadline_s: float | None, *, may_be_shared: bool
    ) -> tuple[bytes | None, str]:
        """Returns an answer that the store has, or that another orchestrator is asking for.

        Without one the call is the asker's to make. An orchestrator that gives up, or dies, loses
        its claim.
        """
        if key is None:
            return None, "miss"
        if not may_be_shared:
            answer = await self._store.find(key)
            return answer, "miss" if answer is None else "hit"
        result, look_s = "hit", _FIRST_LOOK_S
        while (found := await self._store.claim(key)) is False:
            if deadline_s is not None and time.monotonic() >= deadline_s:
                raise DeadlineExceeded("the time limit was over before the step was")
            await asyncio.sleep(look_s)
            result, look_s = "shared", min(_LONGEST_LOOK_S, 2 * look_s)
        return (None, "miss") if found is True else (found, result)

    def _revision(self, role: str) -> str | None:
        revision, said_s = self._revisions.get(role, ("", -_REVISION_TRUST_S))
        return revision if self._clock() - said_s < _REVISION_TRUST_S else None

    def put(self, role: str, revision: str, question: bytes, answer: bytes) -> bytes:
        """Keeps an answer under the revision that gave it, and returns its key."""
        self.serves(role, revision)
        key = answer_key(role, revision, question)
        self._store.put(key, answer, self._ttl_s)
        return key

    def serves(self, role: str, revision: str | None) -> None:
        """Learns which revision serves a role; None where nobody does."""
        if revision is None:
            # What comes up next may be another one: no old answer is given for it.
            self._revisions.pop(role, None)
        else:
            self._revisions[role] = (revision, self._clock())

    async def watch(self, models: Mapping[str, Callable[[], Awaitable[ModelIdentity]]]) -> None:
        """Asks each role's model again and again what it is, until it is cancelled."""

        async def ask(role: str, describe: Callable[[], Awaitable[ModelIdentity]]) -> None:
            try:
                self.serves(role, (await describe()).revision)
            except ArbitrageError:
                self.serves(role, None)

        while True:
            async with asyncio.TaskGroup() as group:
                for role, describe in models.items():
                    group.create_task(ask(role, describe))
            await asyncio.sleep(_REVISION_INTERVAL_S)

    def release(self, key: bytes) -> None:
        """Ends a claim in the store that has come to nothing."""
        self._store.release(key)

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
