"""What a tenant may use in a minute: requests, and tokens that models compute for it.

Each is a bucket that holds a minute's worth and fills evenly. A request is taken out before it
waits for a place, and given back if it gets none. Its tokens are known when it ends, and taken out
then, more than there are if need be: what the bucket owes is paid before the tenant's next request
is taken. A call that goes on with a session is no other request than the one that began it.

A bucket is one number, the moment at which it is full again: one that holds nothing is full in a
minute, one that owes in more. A moment that has passed says nothing, so it need not be kept.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, Protocol

from arbitrage.core.errors import QuotaExceeded
from arbitrage.core.ports import Clock
from services.orchestrator.redis_link import RedisLink, Script, StoreAway
from services.orchestrator.telemetry import QuotaMetrics
from services.rpc.auth import Caller

_MINUTE_S: Final = 60.0
_PREFIX: Final = "arbitrage:quota:"


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be used in a minute; None where there is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def of(self, caller: Caller) -> Limits:
        """Returns the limits of a caller, for whom these are the defaults."""
        requests, tokens = caller.requests_per_minute, caller.tokens_per_minute
        return Limits(
            self.requests_per_minute if requests is None else requests,
            self.tokens_per_minute if tokens is None else tokens,
        )


@dataclass(frozen=True, slots=True)
class Refusal:
    """Says which limit is used up, and in how many seconds it no longer is."""

    quota: str
    wait_s: float


class Buckets(Protocol):
    """Holds the two buckets of every tenant."""

    async def take(self, tenant: str, limits: Limits) -> Refusal | None:
        """Takes one request out, unless there is none, or tokens are owed."""
        ...

    async def give_back(self, tenant: str, limits: Limits) -> None:
        """Puts one request in again."""
        ...

    async def charge(self, tenant: str, limits: Limits, token_count: int) -> None:
        """Takes tokens out, whether or not they are there."""
        ...


_NO_LIMITS: Final = Limits()


class Quotas:
    """Holds callers to their limits; `defaults` are those of callers without."""

    def __init__(self, defaults: Limits, buckets: Buckets, metrics: QuotaMetrics) -> None:
        self._defaults = defaults
        self._buckets = buckets
        self._metrics = metrics

    def apply_to(self, caller: Caller) -> bool:
        """Whether the caller has any limit."""
        return self._defaults.of(caller) != _NO_LIMITS

    async def admit(self, caller: Caller) -> None:
        """Counts a request.

        Raises:
            QuotaExceeded: one of the caller's limits is used up; nothing was counted.
        """
        limits = self._defaults.of(caller)
        if limits == _NO_LIMITS:
            return
        refusal = await self._buckets.take(caller.tenant, limits)
        if refusal is None:
            return
        self._metrics.count_refusal(refusal.quota)
        limit = getattr(limits, f"{refusal.quota}_per_minute")
        # Upwards, for who returns when it was told must not be sent away again.
        wait_s = math.ceil(refusal.wait_s * 1000) / 1000
        raise QuotaExceeded(
            f"{refusal.quota}_per_minute: the tenant's {limit} {refusal.quota} a minute are used "
            f"up; come back in {wait_s:g} s, or have its limit or "
            f"ARBITRAGE_DEFAULT_{refusal.quota.upper()}_PER_MINUTE raised",
            retry_after_s=wait_s,
        )

    async def give_back(self, caller: Caller) -> None:
        """Counts a request no longer that was admitted and is not worked on."""
        limits = self._defaults.of(caller)
        if limits.requests_per_minute is not None:
            await self._buckets.give_back(caller.tenant, limits)

    async def charge(self, caller: Caller, token_count: int) -> None:
        """Counts the tokens that were computed for a caller's request."""
        limits = self._defaults.of(caller)
        if limits.tokens_per_minute is not None and token_count:
            await self._buckets.charge(caller.tenant, limits, token_count)


@dataclass(frozen=True, slots=True)
class _Full:
    """The moments at which a tenant's buckets are full again."""

    requests_s: float = -math.inf
    tokens_s: float = -math.inf


class MemoryBuckets:
    """Holds the buckets of this orchestrator alone; forgets those that are full."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._full: dict[str, _Full] = {}
        self._swept_s = clock()

    @property
    def tenant_count(self) -> int:
        """Tenants of whom anything is known."""
        return len(self._full)

    async def take(self, tenant: str, limits: Limits) -> Refusal | None:
        """Takes one request out, unless there is none, or tokens are owed."""
        now_s, full = self._clock(), self._full.get(tenant, _Full())
        if limits.tokens_per_minute is not None and full.tokens_s - now_s >= _MINUTE_S:
            return Refusal("tokens", full.tokens_s - now_s - _MINUTE_S)
        if limits.requests_per_minute is not None:
            requests_s = _later(full.requests_s, now_s, 1, limits.requests_per_minute)
            if requests_s - now_s > _MINUTE_S:
                return Refusal("requests", requests_s - now_s - _MINUTE_S)
            self._keep(tenant, _Full(requests_s, full.tokens_s), now_s)
        return None

    async def give_back(self, tenant: str, limits: Limits) -> None:
        """Puts one request in again."""
        if limits.requests_per_minute is not None:
            now_s, full = self._clock(), self._full.get(tenant, _Full())
            requests_s = full.requests_s - _MINUTE_S / limits.requests_per_minute
            self._keep(tenant, _Full(requests_s, full.tokens_s), now_s)

    async def charge(self, tenant: str, limits: Limits, token_count: int) -> None:
        """Takes tokens out, whether or not they are there."""
        if limits.tokens_per_minute is not None:
            now_s, full = self._clock(), self._full.get(tenant, _Full())
            tokens_s = _later(full.tokens_s, now_s, token_count, limits.tokens_per_minute)
            self._keep(tenant, _Full(full.requests_s, tokens_s), now_s)

    def _keep(self, tenant: str, full: _Full, now_s: float) -> None:
        self._full[tenant] = full
        if now_s - self._swept_s >= _MINUTE_S:
            self._swept_s = now_s
            self._full = {
                name: known
                for name, known in self._full.items()
                if max(known.requests_s, known.tokens_s) > now_s
            }


def _later(full_s: float, now_s: float, count: int, per_minute: int) -> float:
    """Returns when a bucket will be full once `count` has been taken out of it now."""
    return max(full_s, now_s) + count * _MINUTE_S / per_minute


# The same arithmetic, and the key lives until both buckets are full. By the server's own clock,
# for those of two orchestrators differ. ARGV: requests to take, -1 to give one back, requests a
# minute, tokens to charge, tokens a minute; a limit of 0 is none.
_SCRIPT: Final = Script("""
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local full = redis.call('HMGET', KEYS[1], 'requests', 'tokens')
local requests, tokens = tonumber(full[1] or now), tonumber(full[2] or now)
local take, request_limit = tonumber(ARGV[1]), tonumber(ARGV[2])
local charge, token_limit = tonumber(ARGV[3]), tonumber(ARGV[4])
if take > 0 and token_limit > 0 and tokens - now >= 60 then
  return {'tokens', string.format('%.6f', tokens - now - 60)}
end
if take > 0 and request_limit > 0 then
  requests = math.max(requests, now) + take * 60 / request_limit
  if requests - now > 60 then
    return {'requests', string.format('%.6f', requests - now - 60)}
  end
end
if take < 0 and request_limit > 0 then
  requests = requests + take * 60 / request_limit
end
if charge > 0 and token_limit > 0 then
  tokens = math.max(tokens, now) + charge * 60 / token_limit
end
local last = math.max(requests, tokens)
if last > now then
  redis.call('HSET', KEYS[1],
    'requests', string.format('%.6f', requests), 'tokens', string.format('%.6f', tokens))
  redis.call('PEXPIRE', KEYS[1], math.ceil((last - now) * 1000))
else
  redis.call('DEL', KEYS[1])
end
return {}
""")


class RedisBuckets:
    """Holds the buckets that orchestrators share in Redis, one key for each tenant.

    While Redis is away the buckets of this orchestrator count instead.
    """

    def __init__(
        self, link: RedisLink, metrics: QuotaMetrics, clock: Clock = time.monotonic
    ) -> None:
        self._link = link
        self._metrics = metrics
        self._memory = MemoryBuckets(clock)

    async def take(self, tenant: str, limits: Limits) -> Refusal | None:
        """Takes one request out, unless there is none, or tokens are owed."""
        answer = await self._asked(tenant, limits, request_count=1)
        if answer is None:
            return await self._memory.take(tenant, limits)
        if not answer:
            return None
        quota, wait_s = answer
        return Refusal(quota.decode(), float(wait_s))

    async def give_back(self, tenant: str, limits: Limits) -> None:
        """Puts one request in again."""
        if await self._asked(tenant, limits, request_count=-1) is None:
            await self._memory.give_back(tenant, limits)

    async def charge(self, tenant: str, limits: Limits, token_count: int) -> None:
        """Takes tokens out, whether or not they are there."""
        if await self._asked(tenant, limits, token_count=token_count) is None:
            await self._memory.charge(tenant, limits, token_count)

    async def _asked(
        self, tenant: str, limits: Limits, *, request_count: int = 0, token_count: int = 0
    ) -> list[bytes] | None:
        """Returns what the script does; None while Redis is away."""
        counts = (
            request_count,
            limits.requests_per_minute or 0,
            token_count,
            limits.tokens_per_minute or 0,
        )
        try:
            answer: list[bytes] = await self._link.run(
                "quota", _SCRIPT, (quota_key(tenant),), counts
            )
        except StoreAway:
            self._metrics.count_fallback()
            return None
        return answer


def quota_key(tenant: str) -> bytes:
    """Returns the key of a tenant's buckets; its name may hold anything, and stays out of it."""
    digest = blake2b(tenant.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return f"{_PREFIX}{{{digest}}}".encode()
