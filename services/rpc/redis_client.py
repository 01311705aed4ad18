"""Opens a Redis by its URL, whichever way it is deployed.

What it costs that one is away is the caller's matter, not said here.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final
from urllib.parse import urlsplit

from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.connection import Connection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    RedisClusterException,
    RedisError,
    ResponseError,
)

OLDEST_VERSION: Final = (6, 2)
_CONNECT_TIMEOUT_S: Final = 1.0
_KINDS: Final = (
    "redis://, rediss://, unix://, redis+sentinel://, rediss+sentinel://, redis+cluster://, "
    "rediss+cluster://"
)
_CREDENTIALS = re.compile(r"//[^@/]*@")

Client = Redis | RedisCluster
# What redis-py raises where nobody answers; a cluster's errors are no `RedisError`.
AWAY: Final = (RedisError, RedisClusterException, OSError, TimeoutError)


class RedisUnusable(Exception):
    """A Redis can never serve as it is named. The message says why and how to mend it."""


@asynccontextmanager
async def opened_client(url: str, timeout_s: float) -> AsyncIterator[Client]:
    """Makes a client of the Redis that `url` names, and closes its connections on the way out.

    `redis://`, `rediss://` (TLS) and `unix://` name one server, as redis-py reads them, user and
    password included. `redis+sentinel://host:port,host:port/name/db` asks sentinels for the
    primary called `name`; `redis+cluster://host:port` names any node of a cluster. Each of the
    two has a `rediss+` form. An answer is waited for `timeout_s`.

    Raises:
        RedisUnusable: the URL is none.
    """
    async with AsyncExitStack() as stack:
        try:
            client = _client(url, timeout_s, stack)
        except ValueError as error:
            raise RedisUnusable(str(error)) from None
        except TypeError as error:
            raise RedisUnusable(f"a parameter behind the ? is unknown ({error}); drop it") from None
        yield client


async def server_info(client: Client) -> Mapping[str, Any] | None:
    """Returns what a server says of itself; None where the user may not ask.

    Raises:
        RedisUnusable: it refuses the user, or is too old.
        AWAY: it is away.
    """
    untyped: Any = client
    try:
        async with asyncio.timeout(2 * _CONNECT_TIMEOUT_S):
            if isinstance(client, RedisCluster):
                info = await untyped.info(target_nodes=RedisCluster.RANDOM)
                info = info if "redis_version" in info else next(iter(info.values()))
            else:
                info = await untyped.info()
    except NoPermissionError:
        return None
    except (AuthenticationError, AuthorizationError) as error:
        raise RedisUnusable(f"Redis refuses user or password ({error}); correct them") from None
    except ResponseError as error:
        raise RedisUnusable(f"Redis refuses ({error})") from None
    version = str(info["redis_version"])
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_VERSION:
        raise RedisUnusable(
            f"Redis {version} is too old; use {'.'.join(map(str, OLDEST_VERSION))} or later"
        )
    known: Mapping[str, Any] = info
    return known


def redacted(url: str) -> str:
    """Returns the URL without user and password.

    >>> redacted("redis://me:secret@host:6379/0?ssl_ca_certs=ca.pem")
    'redis://host:6379/0'
    """
    return _CREDENTIALS.sub("//", url.partition("?")[0])


def _client(url: str, timeout_s: float, stack: AsyncExitStack) -> Client:
    scheme = urlsplit(url).scheme
    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
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
        _check_path(url)
        _check_parameters(url, options)
        client = Redis.from_url(url, **options)
    else:
        raise ValueError(f"expected one of {_KINDS}")
    stack.push_async_callback(client.aclose)
    return client


def _check_path(url: str) -> None:
    # redis-py takes what it cannot read as database 0.
    split = urlsplit(url)
    path = split.path.strip("/")
    if split.scheme == "unix":
        if not path:
            raise ValueError("expected the socket's path, as unix:///run/redis.sock")
    elif path and not path.isdecimal():
        raise ValueError(f"expected the number of a database behind the host, got /{path}")


def _check_parameters(url: str, options: Mapping[str, Any]) -> None:
    # Otherwise the first question would find out which parameters there are not.
    parameters: dict[str, Any] = {**options, **parse_url(url)}
    parameters.pop("connection_class", Connection)(**parameters)


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
    _check_parameters(plain, options)
    known = {k: v for k, v in parse_url(plain).items() if k not in {"host", "connection_class"}}
    untyped: Any = Sentinel
    sentinel = untyped(sentinels, sentinel_kwargs=options, **options)
    for asked in sentinel.sentinels:
        stack.push_async_callback(asked.aclose)
    primary: Redis = sentinel.master_for(name, ssl=base == "rediss", **known)
    return primary
