"""The prefix cache's store in Redis, which orchestrators share.

What a model said before is worth having and never needed: while Redis is away, nothing is found
and nothing is kept, and every call goes to its model.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress
from typing import Final

from services.orchestrator.redis_link import RedisLink, Script, StoreAway

# How long a claim lives without being renewed: others wait this long for an orchestrator that died.
_CLAIM_S: Final = 2.0

# Answers on their way to Redis; more than it can take are not kept.
_MOST_UNWRITTEN: Final = 256

# Returns the answer; else 1 where the claim is ours now, 0 where it is another's.
_FIND = Script("""
local answer = redis.call('GET', KEYS[1])
if answer then return answer end
if redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2]) then return 1 end
return 0
""")
_PUT = Script("""
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
if redis.call('GET', KEYS[2]) == ARGV[3] then redis.call('DEL', KEYS[2]) end
""")
_RENEW = Script("""
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
""")
_RELEASE = Script("""
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
""")


class RedisStore:
    """Keeps answers by key in Redis, each with its time to live.

    The memory bound is the server's: `maxmemory` with the policy `volatile-ttl`. `maintain` has to
    run for as long as the store is used: no step waits until its answer is written.
    """

    def __init__(self, link: RedisLink) -> None:
        self._link = link
        # Tells this process's claims from those of others.
        self._holder = secrets.token_bytes(12)
        self._claims: set[bytes] = set()
        self._unwritten: asyncio.Queue[tuple[bytes, bytes, float]] = asyncio.Queue(_MOST_UNWRITTEN)

    async def find(self, key: bytes) -> bytes | None:
        """Returns what was put under `key`; None also while Redis is away."""
        try:
            found: bytes | None = await self._link.ask(
                "get", lambda: self._link.client.get(_answer(key))
            )
        except StoreAway:
            return None
        return found

    async def claim(self, key: bytes) -> bytes | bool:
        """Returns what was put under `key`, else whether its call is now ours to make.

        While Redis is away it is ours.
        """
        arguments = (self._holder, round(_CLAIM_S * 1000))
        try:
            found = await self._link.run("get", _FIND, (_answer(key), _flight(key)), arguments)
        except StoreAway:
            return True
        if isinstance(found, bytes):
            return found
        if found:
            self._claims.add(key)
        return bool(found)

    async def put(self, key: bytes, value: bytes, ttl_s: float) -> None:
        """Keeps `value` soon, and ends the claim then, unless Redis is away, full or slow."""
        try:
            self._unwritten.put_nowait((key, value, ttl_s))
        except asyncio.QueueFull:
            # The claim runs out by itself.
            self._claims.discard(key)

    async def written(self) -> None:
        """Returns once everything that was put so far has been written, or given up."""
        await self._unwritten.join()

    async def release(self, key: bytes) -> None:
        """Ends a claim without an answer."""
        self._claims.discard(key)
        try:
            await self._link.run("put", _RELEASE, (_flight(key),), (self._holder,))
        except StoreAway:
            return

    async def maintain(self) -> None:
        """Writes what is put and renews what is claimed, until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._write())
            group.create_task(self._keep_claims())

    async def _write(self) -> None:
        while True:
            key, value, ttl_s = await self._unwritten.get()
            ttl_ms = max(1, round(ttl_s * 1000))
            keys = (_answer(key), _flight(key))
            with suppress(StoreAway):
                await self._link.run("put", _PUT, keys, (value, ttl_ms, self._holder))
            self._claims.discard(key)
            self._unwritten.task_done()

    async def _keep_claims(self) -> None:
        while True:
            await asyncio.sleep(_CLAIM_S / 4)
            # Together: one after the other, the last of many would come too late.
            async with asyncio.TaskGroup() as group:
                for key in self._claims:
                    group.create_task(self._renew(key))

    async def _renew(self, key: bytes) -> None:
        arguments = (self._holder, round(_CLAIM_S * 1000))
        with suppress(StoreAway):
            await self._link.run("put", _RENEW, (_flight(key),), arguments)


# In a cluster both keys of an answer lie in the slot of what stands between the braces.
def _answer(key: bytes) -> bytes:
    return b"arbitrage:answer:{%s}" % key.hex().encode()


def _flight(key: bytes) -> bytes:
    return b"arbitrage:flight:{%s}" % key.hex().encode()
