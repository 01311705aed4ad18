"""Solutions that can be resumed: what was committed lies in Redis before the caller sees it.

A session is an append-only stream of records and a lease on the right to add to it. Whoever joins
a session reads what is there. While another orchestrator holds the lease, it follows that one's
records; once the lease is free, because its holder ended or died, it takes the lease and goes on.
The lease is fenced: every holder has a higher number than the one before, and Redis takes records
from the latest alone, so one that was only slow cannot add to what another goes on with.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final

from arbitrage.core.errors import (
    DeadlineExceeded,
    FieldInvalid,
    SessionNotFound,
    SessionStoreAway,
    SessionTaken,
)
from arbitrage.v1 import orchestrator_pb2, session_pb2
from services.orchestrator.redis_link import RedisLink, Script, StoreAway
from services.orchestrator.telemetry import SessionMetrics

_log = logging.getLogger(__name__)
_FIRST_LOOK_S: Final = 0.02
_LONGEST_LOOK_S: Final = 0.25
_LONGEST_ID: Final = 128
_DIGEST_BYTES: Final = 20

_NOW: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""
# ARGV: digest of the request, lease and time to live in ms, records known, steps the caller has.
# Returns our number, or 0 while another holds the lease, and the records that are not known; -1
# where the session is another request's, -2 where it lacks steps that the caller has.
_JOIN: Final = Script(
    _NOW
    + """
local request = redis.call('HGET', KEYS[1], 'request')
if request and request ~= ARGV[1] then return {-1, {}} end
if redis.call('XLEN', KEYS[2]) < tonumber(ARGV[5]) then return {-2, {}} end
if not request then
  redis.call('HSET', KEYS[1], 'request', ARGV[1], 'fence', 0, 'until', 0, 'finished', 0)
end
local records = redis.call('XRANGE', KEYS[2], (ARGV[4] + 1) .. '-0', '+')
local held = redis.call('HMGET', KEYS[1], 'until', 'finished', 'fence')
-- A Redis that is full evicts keys one by one: an end without its records is none.
local ended = held[2] ~= '0' and redis.call('EXISTS', KEYS[2]) == 1
local fence = 0
if not ended and (held[2] ~= '0' or tonumber(held[1]) <= now) then
  -- Not from 1: to a Redis that lost its memory, a holder from before must not look like this one.
  fence = math.max(held[3] + 1, now)
  redis.call('HSET', KEYS[1], 'fence', string.format('%.0f', fence), 'until', now + ARGV[2],
    'finished', 0)
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return {fence, records}
"""
)
# ARGV: our number, lease and time to live in ms, place of the record from 1, the record, whether it
# is the last. Returns 1; 0 where another number came after ours; -1 where Redis has lost records.
_APPEND: Final = Script(
    _NOW
    + """
local fence = redis.call('HGET', KEYS[1], 'fence')
if not fence then return -1 end
if fence ~= ARGV[1] then return 0 end
local length = redis.call('XLEN', KEYS[2])
if length < ARGV[4] - 1 then return -1 end
-- A record that is there already is ours, from a try whose answer was lost.
if length < tonumber(ARGV[4]) then
  redis.call('XADD', KEYS[2], ARGV[4] .. '-0', 'record', ARGV[5])
end
redis.call('HSET', KEYS[1], 'until', now + ARGV[2], 'finished', ARGV[6])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return 1
"""
)
# ARGV: our number, lease and time to live in ms, digest of the request, whether the last record is
# the end, all records. Returns 1; 0 where somebody has begun anew.
_RESTORE: Final = Script(
    _NOW
    + """
local fence = redis.call('HGET', KEYS[1], 'fence')
if fence and fence ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[1], 'request', ARGV[4], 'fence', ARGV[1], 'until', now + ARGV[2],
  'finished', ARGV[5])
for place = 1, #ARGV - 5 do
  redis.call('XADD', KEYS[2], place .. '-0', 'record', ARGV[place + 5])
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return 1
"""
)
# ARGV: our number, lease in ms; a lease of 0 gives it back.
_RENEW: Final = Script(
    _NOW
    + """
if redis.call('HGET', KEYS[1], 'fence') == ARGV[1] then
  redis.call('HSET', KEYS[1], 'until', now + ARGV[2])
end
"""
)


@dataclass(frozen=True, slots=True)
class SessionRules:
    """Times of sessions, in seconds.

    An orchestrator that died is given up after `lease_s`; a session is forgotten `ttl_s` after its
    last record; a record that Redis does not take is tried again for `patience_s`.
    """

    lease_s: float = 3.0
    ttl_s: float = 86_400.0
    patience_s: float = 10.0


@dataclass(frozen=True, slots=True)
class SessionName:
    """Which session a request is for, and which request the session is for, both as digests."""

    key: bytes
    request: bytes

    @classmethod
    def of(cls, message: orchestrator_pb2.GenerateSolutionRequest, tenant: str) -> SessionName:
        """Returns the session of a request; every tenant has ids of its own.

        Raises:
            FieldInvalid: the id is none.
        """
        request_id = message.request_id
        if not 1 <= len(request_id) <= _LONGEST_ID or not (
            request_id.isascii() and request_id.isprintable() and " " not in request_id
        ):
            raise FieldInvalid(
                "request_id",
                ascii(request_id),
                f"must be 1 to {_LONGEST_ID} visible ASCII characters",
                "give a UUID, or leave it out",
            )
        asked = orchestrator_pb2.GenerateSolutionRequest()
        asked.CopyFrom(message)
        # What says where and how to read says nothing about what is read.
        for field_name in ("request_id", "resume_after_step", "stream_text"):
            asked.ClearField(field_name)
        key = blake2b(f"{tenant}\0{request_id}".encode(), digest_size=_DIGEST_BYTES)
        request = blake2b(asked.SerializeToString(deterministic=True), digest_size=_DIGEST_BYTES)
        return cls(key.digest(), request.digest())

    @property
    def seed(self) -> int:
        """The seed of a request that gives none: the same wherever it is resumed."""
        return int.from_bytes(self.key[:7], "big")


class Sessions:
    """The sessions in one Redis. `renew` has to run for as long as any is held."""

    def __init__(self, link: RedisLink, rules: SessionRules, metrics: SessionMetrics) -> None:
        self.link = link
        self.rules = rules
        self.metrics = metrics
        self._held: dict[bytes, Session] = {}

    def session(self, name: SessionName, resume_after_step: int) -> Session:
        """Returns a session that is not joined yet."""
        return Session(self, name, resume_after_step)

    def hold(self, session: Session) -> None:
        """Renews a session's lease from now on."""
        self._held[session.name.key] = session
        self.metrics.held(len(self._held))

    def let_go(self, session: Session) -> None:
        """Renews it no more."""
        if self._held.get(session.name.key) is session:
            del self._held[session.name.key]
            self.metrics.held(len(self._held))

    async def renew(self) -> None:
        """Renews every lease that is held, until it is cancelled."""
        while True:
            await asyncio.sleep(self.rules.lease_s / 4)
            # Together: one after the other, the last of many would come too late.
            async with asyncio.TaskGroup() as group:
                for session in self._held.values():
                    group.create_task(self._renew(session))

    async def _renew(self, session: Session) -> None:
        # Where Redis is away, whoever appends next finds out.
        with suppress(StoreAway):
            await session.renew(self.rules.lease_s)


@dataclass(slots=True)
class Session:
    """One solution's records, as far as they are known, and perhaps the right to add to them."""

    sessions: Sessions
    name: SessionName
    resume_after_step: int
    records: list[session_pb2.SessionRecord] = field(default_factory=list)
    _fence: int = 0

    @property
    def is_finished(self) -> bool:
        """Whether the solution has ended."""
        return bool(self.records) and self.records[-1].HasField("finished")

    async def is_known(self) -> bool:
        """Whether an earlier call of the same request began the session.

        Raises:
            SessionStoreAway
        """
        link, key = self.sessions.link, self._keys[0]
        try:
            request = await link.ask(
                "session", lambda: link.client.hget(key, "request"), even_if_away=True
            )
        except StoreAway as error:
            raise _away(error) from error
        return bool(request == self.name.request)

    async def follow(
        self, deadline_s: float | None
    ) -> AsyncGenerator[session_pb2.SessionRecord, None]:
        """Yields the records there are, and those that others add.

        It ends with the solution, or once the lease is held. `deadline_s` is a moment of the
        monotonic clock.

        Raises:
            FieldInvalid: the id was used for another request.
            SessionNotFound: the store lacks steps that the caller has.
            SessionStoreAway, DeadlineExceeded
        """
        look_s, has_waited = _FIRST_LOOK_S, False
        until_s = 0.0
        while True:
            known = len(self.records)
            try:
                fence, found = await self._join(known)
            except SessionStoreAway:
                # Who has begun to read waits for a Redis that is away, as its writer does.
                if not has_waited or time.monotonic() > until_s:
                    raise
                await asyncio.sleep(_LONGEST_LOOK_S)
                continue
            until_s = time.monotonic() + self.sessions.rules.patience_s
            self.records += found
            self._fence = fence
            if fence:
                self.sessions.hold(self)
                self.sessions.metrics.count("resumed" if self.records else "new")
            elif self.is_finished:
                self.sessions.metrics.count("followed" if has_waited else "replayed")
            for record in found:
                yield record
            if fence or self.is_finished:
                return
            if deadline_s is not None and time.monotonic() >= deadline_s:
                raise DeadlineExceeded("the time limit was over while another call went on")
            has_waited = True
            look_s = _FIRST_LOOK_S if found else min(_LONGEST_LOOK_S, 2 * look_s)
            await asyncio.sleep(look_s)

    async def append(self, record: session_pb2.SessionRecord, deadline_s: float | None) -> None:
        """Adds a record, so that it may be shown; waits for a Redis that is away.

        Raises:
            SessionTaken: another call goes on with the session.
            SessionStoreAway: Redis does not come back.
        """
        rules = self.sessions.rules
        until_s = time.monotonic() + rules.patience_s
        if deadline_s is not None:
            until_s = min(until_s, deadline_s)
        self.records.append(record)
        look_s = _FIRST_LOOK_S
        while True:
            try:
                taken = await self._append(record)
                if taken < 0:
                    # Redis came back without its memory; here it still is.
                    _log.warning("a session was lost by Redis and is written anew")
                    self.sessions.metrics.count("restored")
                    taken = await self._restore()
            except StoreAway as error:
                if time.monotonic() + look_s > until_s:
                    raise SessionStoreAway(
                        f"the session store takes no records ({error}); send the same call again"
                    ) from error
                await asyncio.sleep(look_s)
                look_s = min(_LONGEST_LOOK_S, 2 * look_s)
                continue
            if not taken:
                self.sessions.let_go(self)
                self.sessions.metrics.count("taken")
                raise SessionTaken(
                    "request_id: another call goes on with this session; send the same call again "
                    "to follow it"
                )
            if self.is_finished:
                # Nobody wants the lease of a solution that has ended.
                self.sessions.let_go(self)
                self._fence = 0
            return

    async def renew(self, lease_s: float) -> None:
        """Holds the lease for so long from now on.

        Raises:
            StoreAway
        """
        arguments = (self._fence, round(lease_s * 1000))
        await self.sessions.link.run("session", _RENEW, self._keys[:1], arguments)

    async def release(self) -> None:
        """Gives the lease back, if it is held."""
        if not self._fence:
            return
        self.sessions.let_go(self)
        try:
            await self.renew(0.0)
        except StoreAway:
            # It runs out by itself.
            return

    async def _join(self, known: int) -> tuple[int, list[session_pb2.SessionRecord]]:
        arguments = (self.name.request, *self._times_ms, known, self.resume_after_step)
        try:
            fence, entries = await self._run(_JOIN, arguments)
        except StoreAway as error:
            raise _away(error) from error
        if fence == -1:
            raise FieldInvalid(
                "request_id",
                "an id in use",
                "was used for another request",
                "give every request an id of its own",
            )
        if fence == -2:
            raise SessionNotFound(
                f"resume_after_step: no session under this request_id has {self.resume_after_step} "
                "steps; send the request again without request_id and resume_after_step"
            )
        return fence, [session_pb2.SessionRecord.FromString(fields[1]) for _, fields in entries]

    async def _append(self, record: session_pb2.SessionRecord) -> int:
        place, is_last = len(self.records), int(record.HasField("finished"))
        arguments = (self._fence, *self._times_ms, place, record.SerializeToString(), is_last)
        taken: int = await self._run(_APPEND, arguments)
        return taken

    async def _restore(self) -> int:
        records = (record.SerializeToString() for record in self.records)
        head = (self._fence, *self._times_ms, self.name.request, int(self.is_finished))
        taken: int = await self._run(_RESTORE, (*head, *records))
        return taken

    async def _run(self, script: Script, arguments: tuple[Any, ...]) -> Any:
        # Whoever waits for a step waits for Redis, whatever it was a moment ago.
        return await self.sessions.link.run(
            "session", script, self._keys, arguments, even_if_away=True
        )

    @property
    def _keys(self) -> tuple[bytes, bytes]:
        # The braces put both in one slot of a cluster.
        key = b"arbitrage:session:{%s}" % self.name.key.hex().encode()
        return key, key + b":records"

    @property
    def _times_ms(self) -> tuple[int, int]:
        rules = self.sessions.rules
        return round(rules.lease_s * 1000), round(rules.ttl_s * 1000)


def _away(error: StoreAway) -> SessionStoreAway:
    return SessionStoreAway(
        f"request_id: the session store cannot be reached ({error}); try again, or leave "
        "request_id out"
    )
