"""The Redis that orchestrators share: how it is reached, and what its absence costs.

What asks it goes through one `RedisLink`, which bounds every question in time and remembers for a
moment that nobody answered, so that a Redis that hangs costs one wait and not one for each.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from redis.exceptions import NoScriptError, ResponseError

from arbitrage.core.ports import Clock
from services.orchestrator.telemetry import StoreMetrics
from services.rpc.program import StartError
from services.rpc.redis_client import (
    AWAY,
    Client,
    RedisUnusable,
    opened_client,
    redacted,
    server_info,
)

_log = logging.getLogger(__name__)

# How long nobody asks after a failure.
_AWAY_S: Final = 1.0
# Redis makes room among what has a time to live, nearest to its end first: answers before sessions.
_GOOD_EVICTION: Final = "volatile-ttl"

AnswerT = TypeVar("AnswerT")


class StoreAway(Exception):
    """Redis did not answer, or not with what was asked for."""


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script that Redis runs in one piece; its keys lie in one slot."""

    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        # Redis names scripts by SHA-1.
        digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", digest)


class RedisLink:
    """Asks one Redis, whichever way it is deployed; `timeout_s` is the longest an answer takes."""

    def __init__(
        self,
        client: Client,
        metrics: StoreMetrics,
        timeout_s: float,
        clock: Clock = time.monotonic,
    ) -> None:
        self.client: Any = client
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._clock = clock
        self._away_until_s = -_AWAY_S

    async def ask(
        self, operation: str, ask: Callable[[], Awaitable[AnswerT]], *, even_if_away: bool = False
    ) -> AnswerT:
        """Returns the answer to `ask`; `operation` is its name in the metrics.

        Raises:
            StoreAway: there is none in time, or there was none a moment ago and nobody asked now,
                unless `even_if_away`.
        """
        started_s = self._clock()
        if started_s < self._away_until_s and not even_if_away:
            raise StoreAway("Redis did not answer a moment ago")
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await ask()
        except ResponseError as error:
            # It answers, but not this: it is full, or its user may not. Others may fare better.
            self._metrics.count_failure(operation)
            _log.debug("Redis refuses %s: %s", operation, error)
            raise StoreAway(f"Redis refuses: {error}") from error
        except AWAY as error:
            self._metrics.count_failure(operation)
            if self._clock() >= self._away_until_s:
                _log.warning("Redis is away (%s)", _kind(error))
            self._away_until_s = self._clock() + _AWAY_S
            self._metrics.is_up(False)
            raise StoreAway(f"Redis is away ({_kind(error)})") from error
        self._away_until_s = -_AWAY_S
        self._metrics.is_up(True)
        self._metrics.observe(operation, self._clock() - started_s)
        return answer

    async def run(
        self,
        operation: str,
        script: Script,
        keys: Sequence[bytes],
        arguments: Sequence[bytes | int],
        *,
        even_if_away: bool = False,
    ) -> Any:
        """Returns what a script returns; raises as `ask` does."""
        given = (len(keys), *keys, *arguments)

        async def ask() -> Any:
            try:
                return await self.client.evalsha(script.sha, *given)
            except NoScriptError:
                return await self.client.eval(script.text, *given)

        return await self.ask(operation, ask, even_if_away=even_if_away)


@asynccontextmanager
async def opened_redis(
    url: str, metrics: StoreMetrics, timeout_s: float
) -> AsyncIterator[RedisLink]:
    """Connects to the Redis that `url` names, and closes the connections on the way out.

    One that is away is no reason not to start. One that can never serve is.

    Raises:
        StartError: the URL is none, Redis refuses the user, or is too old.
    """
    shown = redacted(url)
    try:
        async with opened_client(url, timeout_s) as client:
            await _check(client, shown)
            yield RedisLink(client, metrics, timeout_s)
    except RedisUnusable as error:
        raise StartError(f"ARBITRAGE_STORE_URL: {shown}: {error}") from None


async def _check(client: Client, shown: str) -> None:
    try:
        info = await server_info(client)
    except AWAY as error:
        _log.warning("%s: Redis is away (%s); starting without it", shown, _kind(error))
        return
    if info is None:
        _log.warning("%s: the user may not ask for INFO, so its version is not checked", shown)
        return
    bound, policy = int(info.get("maxmemory", 0)), str(info.get("maxmemory_policy", ""))
    if not bound or policy != _GOOD_EVICTION:
        _log.warning(
            "%s: Redis has maxmemory %d with %s; set a bound with maxmemory-policy %s, so that "
            "the prefix cache stays within it and no session is evicted for it",
            shown,
            bound,
            policy or "an unknown policy",
            _GOOD_EVICTION,
        )


def _kind(error: Exception) -> str:
    return type(error).__name__
