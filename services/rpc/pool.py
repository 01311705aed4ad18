"""The replicas behind one role: found by name, chosen by request, left out while they fail.

A request keeps to one replica, whose prefix cache it has warmed, by rendezvous hashing: a replica
that comes or goes moves only its own share of the requests. A replica that has more than its share
of the calls in flight is passed over (bounded load, arXiv 1608.01350). One that fails is ejected
and probed until it serves again. Nobody waits for any of it: choosing reads what is known.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from hashlib import blake2b
from typing import Any, Final, TypeVar

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from arbitrage.channels import KEEPALIVE_S, lasting
from services.rpc.addresses import listed, looked_up
from services.rpc.background import in_background
from services.rpc.hedging import AnswerTimes, Budget
from services.rpc.telemetry import PoolMetrics

_log = logging.getLogger(__name__)
_MIB: Final = 1 << 20
# A replica may have this much more than the mean of the calls in flight.
_LOAD_FACTOR: Final = 1.25
_FIRST_EJECTION_S: Final = 0.5
_LONGEST_EJECTION_S: Final = 2.0
_PROBE_INTERVAL_S: Final = 0.25
_HEALTH_TIMEOUT_S: Final = 2.0
# The share of the calls that may be made again, after a failure or while one is late, and how many
# may be at once.
_RETRIES: Final = (0.2, 10.0)
_HEDGES: Final = (0.05, 5.0)
_FIRST_WAIT_S: Final = 0.05
_LONGEST_WAIT_S: Final = 2.0
RESOLVE_INTERVAL_S: Final = 2.0

StubT = TypeVar("StubT")
# Opens a channel to an address; `name` is who is expected there, for certificates.
OpenChannel = Callable[[str, str], grpc.aio.Channel]


def open_channel(
    address: str,
    name: str = "",
    max_message_mib: int = 16,
    credentials: grpc.ChannelCredentials | None = None,
    keepalive_s: float = KEEPALIVE_S,
) -> grpc.aio.Channel:
    """Returns a channel to a model service. It connects when it is first used.

    `name` is the host that is meant, where the address was looked up; with `credentials`, the
    server's certificate must bear it. A server that is silent for `keepalive_s` seconds is asked
    whether it is there, and lost where it does not say so in half of that.
    """
    options: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", max_message_mib * _MIB),
        ("grpc.max_send_message_length", max_message_mib * _MIB),
        *lasting(keepalive_s),
        # Also between calls, so that the next one does not find out.
        ("grpc.keepalive_permit_without_calls", 1),
        # Two pools, as of draft and target behind one address, do not share a connection.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if name:
        options.append(("grpc.default_authority", name))
    if credentials is None:
        return grpc.aio.insecure_channel(address, options)
    if name:
        options.append(("grpc.ssl_target_name_override", name))
    return grpc.aio.secure_channel(address, credentials, options)


class Replica:
    """One address, its channel, and how it has done lately."""

    def __init__(self, address: str, channel: grpc.aio.Channel) -> None:
        self.address = address
        self.inflight_count = 0
        self.is_ejected = False
        self._channel = channel
        self._stubs: dict[object, Any] = {}
        self._ejection_s = _FIRST_EJECTION_S
        self._probe_at_s = 0.0

    def stub(self, kind: Callable[[grpc.aio.Channel], StubT]) -> StubT:
        """Returns this replica's stub of a service."""
        if kind not in self._stubs:
            self._stubs[kind] = kind(self._channel)
        found: StubT = self._stubs[kind]
        return found

    def eject(self, now_s: float) -> None:
        """Leaves it out until a probe has found it serving; longer each time in a row."""
        if self.is_ejected and now_s < self._probe_at_s:
            return  # calls that were under way together fail together
        self.is_ejected = True
        self._probe_at_s = now_s + self._ejection_s
        self._ejection_s = min(_LONGEST_EJECTION_S, 2 * self._ejection_s)

    def succeeded(self) -> None:
        """Forgets earlier failures."""
        self._ejection_s = _FIRST_EJECTION_S

    def wants_probe(self, now_s: float) -> bool:
        """Whether it is time to ask whether it serves again."""
        return self.is_ejected and now_s >= self._probe_at_s

    async def is_serving(self, service: str = "") -> bool:
        """Asks its health service."""
        request = health_pb2.HealthCheckRequest(service=service)
        # Counted, so that no channel is closed under it: that would cancel whoever asks.
        self.inflight_count += 1
        try:
            stub = self.stub(health_pb2_grpc.HealthStub)
            answer = await stub.Check(request, timeout=_HEALTH_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return False
        finally:
            self.inflight_count -= 1
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def close(self) -> None:
        """Closes its channel once no call is on it."""
        while self.inflight_count:  # noqa: ASYNC110 - calls end in many places
            await asyncio.sleep(_PROBE_INTERVAL_S)
        await self._channel.close(None)


class Pool:
    """The replicas of one role. `maintain` has to run for as long as it is used."""

    def __init__(
        self,
        role: str,
        address: str,
        channel_opener: OpenChannel = open_channel,
        metrics: PoolMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
        hedge_quantile: float = 0.0,
    ) -> None:
        self.role = role
        self.address = address
        self.metrics = metrics or PoolMetrics(CollectorRegistry())
        self.replicas: tuple[Replica, ...] = ()
        self.answer_times = AnswerTimes(hedge_quantile)
        self._open = channel_opener
        self._clock = clock
        self._looked_up: Mapping[str, Mapping[str, str]] = {}
        self._reported: set[str] = set()
        self._leaving: set[asyncio.Task[None]] = set()
        self._retries = Budget(*_RETRIES)
        self._hedges = Budget(*_HEDGES)

    def choose(
        self, key: bytes, tried: Collection[Replica] = (), *, is_spare: bool = False
    ) -> Replica | None:
        """Returns the replica for a call; None where every one is ejected or was tried.

        A spare one has to have less than its share of the calls in flight.
        """
        ready = [replica for replica in self.replicas if not replica.is_ejected]
        left = [replica for replica in ready if replica not in tried]
        if not left:
            return None
        total = sum(replica.inflight_count for replica in ready)
        bound = math.ceil(_LOAD_FACTOR * (total + 1) / len(ready))
        ranked = sorted(left, key=lambda replica: _rank(key, replica.address))
        for replica in ranked:
            if replica.inflight_count < bound:
                return replica
        return None if is_spare else ranked[0]

    def began(self) -> None:
        """Counts a call; some of them may be tried again on another replica."""
        self._retries.earn()
        self._hedges.earn()

    def may_retry(self) -> bool:
        """Takes a retry from the budget; False where it is used up."""
        if not self._retries.take():
            return False
        self.metrics.count_retry(self.role)
        return True

    def may_hedge(self) -> bool:
        """Takes a hedge from the budget; False where it is used up."""
        if not self._hedges.take():
            return False
        self.metrics.count_hedge(self.role)
        return True

    def eject(self, replica: Replica) -> None:
        """Leaves a replica out until it serves again."""
        if not replica.is_ejected:
            _log.warning("%s: a replica is ejected", self.role)
            self.metrics.count_ejection(self.role)
        replica.eject(self._clock())
        self._show()

    async def resolve(self, *, anew: bool = False) -> None:
        """Looks up who is there. What cannot be looked up stays as it was.

        With `anew` every channel is opened again, as after certificates have changed.
        """
        try:
            parts = await listed(self.address)
        except OSError as error:
            self._unknown(self.address, error)
            return
        self._reported &= {*parts}
        looked = await asyncio.gather(*(self._look_up(part) for part in parts))
        found = {address: name for part in looked for address, name in part.items()}
        if not found:
            return
        self._looked_up = dict(zip(parts, looked, strict=True))
        known = {} if anew else {replica.address: replica for replica in self.replicas}
        before, self.replicas = (
            self.replicas,
            tuple(
                known[address] if address in known else Replica(address, self._open(address, name))
                for address, name in sorted(found.items())
            ),
        )
        self._leave(replica for replica in before if replica not in self.replicas)
        self._show()

    async def maintain(self, interval_s: float = RESOLVE_INTERVAL_S) -> None:
        """Looks up replicas and probes the ejected ones, until it is cancelled."""
        resolve_at_s = self._clock() + interval_s
        while True:
            await asyncio.sleep(min(_PROBE_INTERVAL_S, interval_s))
            if self._clock() >= resolve_at_s:
                await self.resolve()
                resolve_at_s = self._clock() + interval_s
            now_s = self._clock()
            due = [replica for replica in self.replicas if replica.wants_probe(now_s)]
            async with asyncio.TaskGroup() as group:
                for replica in due:
                    group.create_task(self._probe(replica))

    async def wait_until_serving(self, service: str) -> None:
        """Returns once a replica reports SERVING; asks again and again, ever more slowly."""
        wait_s, reported = _FIRST_WAIT_S, False
        while True:
            for replica in self.replicas:
                if await replica.is_serving(service):
                    return
            if wait_s >= _LONGEST_WAIT_S and not reported:
                _log.warning("still waiting for the %s at %s", self.role, self.address)
                reported = True
            await asyncio.sleep(wait_s)
            wait_s = min(_LONGEST_WAIT_S, wait_s * 2)

    async def close(self) -> None:
        """Closes every channel."""
        for task in self._leaving:
            task.cancel()
        for replica in self.replicas:
            replica.inflight_count = 0
            await replica.close()

    async def _probe(self, replica: Replica) -> None:
        if await replica.is_serving():
            replica.is_ejected = False
            replica.succeeded()
            _log.info("%s: a replica serves again", self.role)
        else:
            replica.eject(self._clock())
        self._show()

    async def _look_up(self, part: str) -> Mapping[str, str]:
        try:
            found = await looked_up(part)
        except OSError as error:
            self._unknown(part, error)
            return self._looked_up.get(part, {})
        self._reported.discard(part)
        return found

    def _unknown(self, what: str, error: OSError) -> None:
        # Once, and not at every look.
        level = logging.DEBUG if what in self._reported else logging.WARNING
        self._reported.add(what)
        _log.log(level, "%s: %s cannot be looked up: %s", self.role, what, error)

    def _leave(self, replicas: Iterable[Replica]) -> None:
        # Calls on a replica that is gone from the list may end there.
        for replica in replicas:
            task = asyncio.get_running_loop().create_task(replica.close())
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    def _show(self) -> None:
        ejected = sum(replica.is_ejected for replica in self.replicas)
        self.metrics.show(self.role, len(self.replicas) - ejected, ejected)


@asynccontextmanager
async def opened_pool(
    role: str,
    address: str,
    channel_opener: OpenChannel = open_channel,
    metrics: PoolMetrics | None = None,
    interval_s: float = RESOLVE_INTERVAL_S,
    hedge_quantile: float = 0.0,
) -> AsyncIterator[Pool]:
    """Looks up a role's replicas, and keeps the pool right until the block is left."""
    pool = Pool(role, address, channel_opener, metrics, hedge_quantile=hedge_quantile)
    await pool.resolve()
    async with in_background(pool.maintain(interval_s)):
        try:
            yield pool
        finally:
            await pool.close()


def _rank(key: bytes, address: str) -> bytes:
    return blake2b(key + address.encode(), digest_size=8).digest()
