"""The Redis that orchestrators share: how it is reached, and what its absence costs.

What asks it goes through one `RedisLink`, which bounds every question in time and remembers for a
moment that nobody answered, so that a Redis that hangs costs one wait and not one for each.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    NoScriptError,
    RedisError,
    ResponseError,
)

from arbitrage.core.ports import Clock
from services.orchestrator.telemetry import StoreMetrics
from services.rpc.program import StartError

_log = logging.getLogger(__name__)

OLDEST_VERSION: Final = (6, 2)
# A step takes tens of milliseconds at least; a store that takes longer than this is of no use.
_TIMEOUT_S: Final = 0.25
_CONNECT_TIMEOUT_S: Final = 1.0
# How long nobody asks after a failure.
_AWAY_S: Final = 1.0
_KINDS: Final = (
    "redis://, rediss://, unix://, redis+sentinel://, rediss+sentinel://, redis+cluster://, "
    "rediss+cluster://"
)
_CREDENTIALS = re.compile(r"//[^@/]*@")
# Redis makes room among what has a time to live, nearest to its end first: answers before sessions.
_GOOD_EVICTION: Final = "volatile-ttl"

Client = Redis | RedisCluster
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
    """Asks one Redis, whichever way it is deployed."""

    def __init__(
        self, client: Client, metrics: StoreMetrics, clock: Clock = time.monotonic
    ) -> None:
        self.client: Any = client
        self._metrics = metrics
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
            async with asyncio.timeout(_TIMEOUT_S):
                answer = await ask()
        except ResponseError as error:
            # It answers, but not this: it is full, or its user may not. Others may fare better.
            self._metrics.count_failure(operation)
            _log.debug("Redis refuses %s: %s", operation, error)
            raise StoreAway(f"Redis refuses: {error}") from error
        except (RedisError, OSError, TimeoutError) as error:
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
async def opened_redis(url: str, metrics: StoreMetrics) -> AsyncIterator[RedisLink]:
    """Connects to the Redis that `url` names, and closes the connections on the way out.

    `redis://`, `rediss://` (TLS) and `unix://` name one server, as redis-py reads them, user and
    password included. `redis+sentinel://host:port,host:port/name/db` asks sentinels for the
    primary called `name`; `redis+cluster://host:port` names any node of a cluster. Each of the
    two has a `rediss+` form.

    One that is away is no reason not to start. One that can never serve is.

    Raises:
        StartError: the URL is none, Redis refuses the user, or is too old.
    """
    shown = redacted(url)
    async with AsyncExitStack() as stack:
        try:
            client = _client(url, stack)
        except ValueError as error:
            raise StartError(f"ARBITRAGE_STORE_URL: {shown}: {error}") from None
        await _check(client, shown)
        yield RedisLink(client, metrics)


def redacted(url: str) -> str:
    """Returns the URL without user and password.

    >>> redacted("redis://me:secret@host:6379/0?ssl_ca_certs=ca.pem")
    'redis://host:6379/0'
    """
    return _CREDENTIALS.sub("//", url.partition("?")[0])


def _client(url: str, stack: AsyncExitStack) -> Client:
    scheme = urlsplit(url).scheme
    options: dict[str, Any] = {
        "socket_timeout": _TIMEOUT_S,
        "socket_connect_timeout": _CONNECT_TIMEOUT_S,
        # A connection that died in the pool is replaced at once; anything more is being away.
        "retry": Retry(NoBackoff(), 1),
        # To name itself, each connection would look up its version on the disk.
        "driver_info": None,
    }
    base, _, kind = scheme.partition("+")
    if kind == "cluster" and base in {"redis", "rediss"}:
        client: Client = RedisCluster.from_url(url.replace(scheme, base, 1), **options)
    elif kind == "sentinel" and base in {"redis", "rediss"}:
        client = _sentinel_primary(url, base, options, stack)
    elif scheme in {"redis", "rediss", "unix"}:
        client = Redis.from_url(url, **options)
    else:
        raise ValueError(f"expected one of {_KINDS}")
    stack.push_async_callback(client.aclose)
    return client


def _sentinel_primary(url: str, base: str, options: dict[str, Any], stack: AsyncExitStack) -> Redis:
    split = urlsplit(url)
    credentials, _, hosts = split.netloc.rpartition("@")
    name, _, database = split.path.strip("/").partition("/")
    try:
        sentinels = [
            (host, int(port)) for host, port in (h.rsplit(":", 1) for h in hosts.split(","))
        ]
    except ValueError:
        raise ValueError("expected host:port,host:port behind //") from None
    if not name:
        raise ValueError("expected the primary's name behind the hosts, as /mymaster")
    # What redis-py makes of a plain URL: user, password, TLS files.
    plain = f"{base}://{credentials}@host/{database or 0}?{split.query}"
    known = {k: v for k, v in parse_url(plain).items() if k not in {"host", "connection_class"}}
    untyped: Any = Sentinel
    sentinel = untyped(sentinels, sentinel_kwargs=options, **options)
    for asked in sentinel.sentinels:
        stack.push_async_callback(asked.aclose)
    primary: Redis = sentinel.master_for(name, ssl=base == "rediss", **known)
    return primary


async def _check(client: Client, shown: str) -> None:
    untyped: Any = client
    try:
        async with asyncio.timeout(2 * _CONNECT_TIMEOUT_S):
            if isinstance(client, RedisCluster):
                info = await untyped.info(target_nodes=RedisCluster.RANDOM)
                info = info if "redis_version" in info else next(iter(info.values()))
            else:
                info = await untyped.info()
    except NoPermissionError:
        _log.warning("%s: the user may not ask for INFO, so its version is not checked", shown)
        return
    except (AuthenticationError, AuthorizationError) as error:
        raise StartError(
            f"ARBITRAGE_STORE_URL: {shown}: Redis refuses user or password ({error}); correct them"
        ) from None
    except ResponseError as error:
        raise StartError(f"ARBITRAGE_STORE_URL: {shown}: Redis refuses ({error})") from None
    except (RedisError, OSError, TimeoutError) as error:
        _log.warning("%s: Redis is away (%s); starting without it", shown, _kind(error))
        return
    version = str(info["redis_version"])
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_VERSION:
        raise StartError(
            f"ARBITRAGE_STORE_URL: {shown}: Redis {version} is too old; use "
            f"{'.'.join(map(str, OLDEST_VERSION))} or later"
        )
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
