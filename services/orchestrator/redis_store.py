"""The prefix cache's store in Redis, which orchestrators share.

What a model said before is worth having and never needed: while Redis is away, nothing is found
and nothing is kept, and every call goes to its model.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from services.orchestrator.redis_link import RedisLink, Script, StoreAway

# How long a claim lives without being renewed: others wait this long for an orchestrator that died.
_CLAIM_S: Final = 2.0

# What is on its way to Redis; more than it can take is not kept.
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
_CLAIM = Script("""
if redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2])
end
""")
_RENEW = Script("""
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
""")
_RELEASE = Script("""
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
""")


@dataclass(frozen=True, slots=True)
class _Write:
    """Something to be said to Redis about the answer to one question."""

    key: bytes
    script: Script
    keys: tuple[bytes, ...]
    arguments: tuple[bytes | int, ...]
    ends_claim: bool = True


class RedisStore:
    """Keeps answers by key in Redis, each with its time to live.

    The memory bound is the server's: `maxmemory` with the policy `volatile-ttl`. `maintain` has to
    run for as long as the store is used: no step waits until something is written, and what is
    written arrives in the order in which it was said.
    """

    def __init__(self, link: RedisLink) -> None:
        self._link = link
        # Tells this process's claims from those of others.
        self._holder = secrets.token_bytes(12)
        self._claims: set[bytes] = set()
        self._unwritten: asyncio.Queue[_Write] = asyncio.Queue(_MOST_UNWRITTEN)

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

    def claim_unseen(self, key: bytes) -> None:
        """Claims `key` soon, unless there is an answer or another's claim by then."""
        arguments = (self._holder, round(_CLAIM_S * 1000))
        self._claims.add(key)
        self._say(_Write(key, _CLAIM, (_answer(key), _flight(key)), arguments, ends_claim=False))

    def put(self, key: bytes, value: bytes, ttl_s: float) -> None:
        """Keeps `value` soon, and ends the claim then, unless Redis is away, full or slow."""
        arguments = (value, max(1, round(ttl_s * 1000)), self._holder)
        self._say(_Write(key, _PUT, (_answer(key), _flight(key)), arguments))

    def release(self, key: bytes) -> None:
        """Ends a claim without an answer, soon."""
        self._say(_Write(key, _RELEASE, (_flight(key),), (self._holder,)))

    async def written(self) -> None:
        """Returns once everything that was said so far has been written, or given up."""
        await self._unwritten.join()

    def _say(self, write: _Write) -> None:
        try:
            self._unwritten.put_nowait(write)
        except asyncio.QueueFull:
            # The claim runs out by itself.
            self._claims.discard(write.key)

    async def maintain(self) -> None:
        """Writes what was said and renews what is claimed, until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._write())
            group.create_task(self._keep_claims())

    async def _write(self) -> None:
        while True:
            write = await self._unwritten.get()
            with suppress(StoreAway):
                await self._link.run("put", write.script, write.keys, write.arguments)
            if write.ends_claim:
                self._claims.discard(write.key)
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
