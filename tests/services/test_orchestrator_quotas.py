"""Quotas: what a tenant may use in a minute, in a real Redis and in memory by the same tests."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio import RedisCluster

from arbitrage.core.errors import FieldInvalid, Overloaded, QuotaExceeded
from arbitrage.v1 import orchestrator_pb2 as pb
from arbitrage.v1.trajectory_pb2 import STOP_REASON_DEADLINE
from services.orchestrator.quotas import (
    Buckets,
    Limits,
    MemoryBuckets,
    Quotas,
    RedisBuckets,
    quota_key,
)
from services.orchestrator.redis_link import RedisLink
from services.orchestrator.telemetry import QuotaMetrics, StoreMetrics
from services.rpc.auth import ANONYMOUS, Caller
from tests.services.redis_servers import RedisServer, free_port, give_all_slots, redis_server
from tests.services.running import House, asking, committed, refusal, solution, until

NO_LIMITS = Limits()


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as running:
        yield running


@dataclass
class Office:
    """Quotas over some buckets, with what they count."""

    buckets: Callable[[QuotaMetrics], Buckets]
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def quotas(self, defaults: Limits = NO_LIMITS) -> Quotas:
        """Returns quotas with those defaults."""
        metrics = QuotaMetrics(self.registry)
        return Quotas(defaults, self.buckets(metrics), metrics)

    def counted(self, name: str, **labels: str) -> float | None:
        """Returns a metric."""
        return self.registry.get_sample_value(name, labels)


def linked(client: Any, timeout_s: float = 5.0) -> RedisLink:
    """Returns what quotas ask Redis through."""
    return RedisLink(client, StoreMetrics(CollectorRegistry()), timeout_s)


@asynccontextmanager
async def client_of(server: RedisServer, timeout_s: float = 5.0) -> AsyncIterator[AsyncRedis]:
    client = AsyncRedis(port=server.port, socket_timeout=timeout_s, driver_info=None)
    try:
        yield client
    finally:
        await client.aclose()


@pytest.fixture(params=["memory", "redis"])
async def office(
    request: pytest.FixtureRequest, shared_server: RedisServer
) -> AsyncIterator[Office]:
    if request.param == "memory":
        yield Office(lambda metrics: MemoryBuckets())
        return
    async with client_of(shared_server) as client:
        await client.flushall()
        office = Office(lambda metrics: RedisBuckets(linked(client), metrics))
        yield office
        # It was Redis that answered.
        assert office.counted("arbitrage_quota_fallbacks_total") in (0, None)


async def refused(quotas: Quotas, caller: Caller) -> QuotaExceeded:
    """Returns what a request is refused with."""
    with pytest.raises(QuotaExceeded) as raised:
        await quotas.admit(caller)
    return raised.value


async def test_a_minutes_requests_are_taken_at_once_and_then_one_by_one(office: Office) -> None:
    quotas = office.quotas()
    caller = Caller("a", requests_per_minute=30)
    for _ in range(30):
        await quotas.admit(caller)
    error = await refused(quotas, caller)
    assert 0 < error.retry_after_s <= 2
    await asyncio.sleep(error.retry_after_s)
    await quotas.admit(caller)


async def test_a_refusal_names_the_quota_the_limit_and_when_to_return(office: Office) -> None:
    quotas = office.quotas()
    caller = Caller("a", requests_per_minute=1, tokens_per_minute=10)
    await quotas.admit(caller)
    error = await refused(quotas, caller)
    assert str(error).startswith("requests_per_minute: the tenant's 1 requests a minute are used")
    assert "ARBITRAGE_DEFAULT_REQUESTS_PER_MINUTE" in str(error)
    assert 55 < error.retry_after_s <= 60
    await quotas.charge(caller, 11)
    error = await refused(quotas, caller)
    assert str(error).startswith("tokens_per_minute: the tenant's 10 tokens a minute")
    assert office.counted("arbitrage_quota_refusals_total", quota="requests") == 1
    assert office.counted("arbitrage_quota_refusals_total", quota="tokens") == 1


async def test_tokens_may_be_owed_and_are_paid_before_the_next_request(office: Office) -> None:
    quotas = office.quotas()
    caller = Caller("a", tokens_per_minute=1000)
    await quotas.admit(caller)
    await quotas.charge(caller, 999)
    await quotas.admit(caller)
    # A minute's worth and three more: those take three minutes to pay.
    await quotas.charge(caller, 3001)
    assert 175 < (await refused(quotas, caller)).retry_after_s <= 180
    await quotas.charge(caller, 1000)
    assert 235 < (await refused(quotas, caller)).retry_after_s <= 240


async def test_who_returns_when_it_was_told_is_let_in(office: Office) -> None:
    quotas = office.quotas()
    caller = Caller("a", tokens_per_minute=60_000)
    await quotas.charge(caller, 61_000)
    await asyncio.sleep((await refused(quotas, caller)).retry_after_s)
    await quotas.admit(caller)


async def test_a_refused_request_takes_nothing_out(office: Office) -> None:
    quotas = office.quotas()
    caller = Caller("a", requests_per_minute=3, tokens_per_minute=60_000)
    await quotas.charge(caller, 61_000)
    for _ in range(5):
        error = await refused(quotas, caller)
    await asyncio.sleep(error.retry_after_s)
    for _ in range(3):
        await quotas.admit(caller)
    assert "requests_per_minute" in str(await refused(quotas, caller))


async def test_a_request_that_is_given_back_can_be_taken_again(office: Office) -> None:
    quotas = office.quotas()
    caller = Caller("a", requests_per_minute=2, tokens_per_minute=60_000)
    await quotas.charge(caller, 30_000)
    await quotas.admit(caller)
    await quotas.admit(caller)
    await refused(quotas, caller)
    await quotas.give_back(caller)
    await quotas.admit(caller)
    await refused(quotas, caller)


async def test_giving_back_fills_no_bucket_above_a_minutes_worth(office: Office) -> None:
    quotas = office.quotas()
    caller = Caller("a", requests_per_minute=2)
    await quotas.give_back(caller)
    await quotas.admit(caller)
    for _ in range(3):
        await quotas.give_back(caller)
    await quotas.admit(caller)
    await quotas.admit(caller)
    await refused(quotas, caller)


async def test_tenants_have_buckets_of_their_own_and_keys_of_a_tenant_share_them(
    office: Office,
) -> None:
    quotas = office.quotas(Limits(requests_per_minute=1))
    await quotas.admit(Caller("a", key_id="first"))
    await quotas.admit(Caller("b"))
    await quotas.admit(ANONYMOUS)
    await refused(quotas, Caller("a", key_id="second"))
    # What a key says goes before what the setting says.
    await quotas.admit(Caller("c", requests_per_minute=2))
    await quotas.admit(Caller("c", requests_per_minute=2))


async def test_without_limits_nothing_is_counted(office: Office) -> None:
    quotas = office.quotas()
    for _ in range(100):
        await quotas.admit(ANONYMOUS)
        await quotas.charge(ANONYMOUS, 10**12)
    await quotas.admit(replace(ANONYMOUS, tokens_per_minute=1))


async def test_tenants_that_are_idle_are_forgotten_in_memory() -> None:
    now_s = 0.0
    buckets = MemoryBuckets(lambda: now_s)
    limits = Limits(requests_per_minute=60)
    for number in range(500):
        assert await buckets.take(f"tenant {number}", limits) is None
    assert buckets.tenant_count == 500
    now_s = 61.0
    assert await buckets.take("another", limits) is None
    assert buckets.tenant_count == 1


async def test_tenants_that_are_idle_are_forgotten_in_redis(shared_server: RedisServer) -> None:
    async with client_of(shared_server) as client:
        await client.flushall()
        buckets = RedisBuckets(linked(client), QuotaMetrics(CollectorRegistry()))
        await buckets.take("a", Limits(requests_per_minute=6000))
        await buckets.charge("b", Limits(tokens_per_minute=100), 50)
        # Named by digest alone, and hash-tagged: one slot of a cluster.
        keys = await client.keys("*")
        assert set(keys) <= {quota_key("a"), quota_key("b")}
        assert quota_key("b").startswith(b"arbitrage:quota:{")
        # It is full again in half a minute, and then says nothing.
        assert 25_000 < await client.pttl(quota_key("b")) <= 30_000
        async with asyncio.timeout(20):
            while await client.exists(quota_key("a")):  # noqa: ASYNC110 - no event tells of it
                await asyncio.sleep(0.01)


async def test_two_orchestrators_share_one_bucket(shared_server: RedisServer) -> None:
    async with client_of(shared_server) as one, client_of(shared_server) as other:
        await one.flushall()
        caller = Caller("a", requests_per_minute=10)
        offices = (
            Office(lambda metrics: RedisBuckets(linked(one), metrics)).quotas(),
            Office(lambda metrics: RedisBuckets(linked(other), metrics)).quotas(),
        )
        results = await asyncio.gather(
            *(offices[number % 2].admit(caller) for number in range(30)), return_exceptions=True
        )
    assert results.count(None) == 10
    assert sum(isinstance(result, QuotaExceeded) for result in results) == 20


async def test_while_redis_is_away_each_orchestrator_counts_alone(server: RedisServer) -> None:
    async with client_of(server) as client:
        office = Office(lambda metrics: RedisBuckets(linked(client), metrics))
        quotas = office.quotas()
        caller = Caller("a", requests_per_minute=2)
        await quotas.admit(caller)
        await asyncio.to_thread(server.kill)
        await quotas.admit(caller)
        await quotas.admit(caller)
        await refused(quotas, caller)
        assert office.counted("arbitrage_quota_fallbacks_total") == 3
        # And Redis counts again when it is back, from what it knows.
        await asyncio.to_thread(server.start)
        await asyncio.sleep(1.0)
        await quotas.admit(caller)
        assert office.counted("arbitrage_quota_fallbacks_total") == 3


async def test_a_redis_that_hangs_costs_one_wait_and_not_one_for_each(server: RedisServer) -> None:
    async with client_of(server, 0.25) as client:
        office = Office(lambda metrics: RedisBuckets(linked(client, 0.25), metrics))
        quotas = office.quotas()
        caller = Caller("a", requests_per_minute=1000)
        await quotas.admit(caller)
        before = office.counted("arbitrage_quota_fallbacks_total") or 0.0
        assert server.process is not None
        server.process.send_signal(signal.SIGSTOP)
        try:
            # Two hundred waits of a quarter of a second would be fifty.
            async with asyncio.timeout(25):
                for _ in range(200):
                    await quotas.admit(caller)
        finally:
            server.process.send_signal(signal.SIGCONT)
    assert office.counted("arbitrage_quota_fallbacks_total") == before + 200


@pytest.fixture
def house() -> House:
    return House()


async def test_a_house_refuses_who_has_used_up_its_requests_before_any_work(house: House) -> None:
    house.settings |= {"default_requests_per_minute": 2}
    async with house.open() as stub:
        # What makes no sense is refused without being counted.
        assert isinstance(await refusal(stub, asking(resume_after_step=1)), FieldInvalid)
        await solution(stub, asking())
        await solution(stub, asking())
        calls = house.draft.call_count
        error = await refusal(stub, asking(problem="another"))
    assert isinstance(error, QuotaExceeded)
    assert error.retry_after_s > 0
    assert house.draft.call_count == calls


async def test_a_request_that_finds_no_place_uses_no_quota(house: House) -> None:
    house.settings |= {"default_requests_per_minute": 3, "max_concurrency": 1, "max_queue": 1}
    house.draft.may_answer.clear()
    async with house.open() as stub, asyncio.TaskGroup() as group:
        first = group.create_task(solution(stub, asking()))
        await until(lambda: house.metric("arbitrage_solutions_running") == 1)
        # One waits and leaves, one is sent away, and one waits until its time is over.
        waiting = stub.GenerateSolution(asking(problem="another"))
        reading = group.create_task(_first_of(waiting))
        await until(lambda: house.metric("arbitrage_solutions_waiting") == 1)
        assert type(await refusal(stub, asking(problem="a third"))) is Overloaded
        waiting.cancel()
        await reading
        await until(lambda: house.metric("arbitrage_solutions_waiting") == 0)
        hurried = asking(problem="a fourth")
        hurried.budgets.time_limit.FromMilliseconds(50)
        events = await solution(stub, hurried)
        assert events[-1].finished.stop_reason == STOP_REASON_DEADLINE
        house.draft.may_answer.set()
        await first
        await solution(stub, asking(problem="a fifth"))
        await solution(stub, asking(problem="a sixth"))
        assert isinstance(await refusal(stub, asking(problem="a seventh")), QuotaExceeded)
    assert house.metric("arbitrage_quota_refusals_total", quota="requests") == 1


async def _first_of(call: Any) -> None:
    """Waits for a stream's first event, which it may never have."""
    with suppress(asyncio.CancelledError):
        await anext(aiter(call))


async def test_a_call_that_goes_on_with_a_session_is_no_other_request(server: RedisServer) -> None:
    shared = {"default_requests_per_minute": 1, "store_url": server.url}
    one, other = House(settings=shared), House(settings=shared)
    async with one.open() as stub, other.open() as second:
        call = stub.GenerateSolution(asking(request_id="id-1"), timeout=20)
        while not (await anext(aiter(call))).HasField("step_committed"):
            pass
        call.cancel()
        resumed = await solution(second, asking(request_id="id-1", resume_after_step=1))
        assert [step.step_index for step in committed(resumed)] == [1, 2]
        again = await solution(second, asking(request_id="id-1"))
        assert len(committed(again)) == 3
        for unknown in (asking(request_id="id-2"), asking(request_id="id-1", problem="another")):
            assert isinstance(await refusal(second, unknown), QuotaExceeded)


async def test_a_solutions_tokens_are_charged_when_it_ends(house: House) -> None:
    # Three steps of three tokens, each after seven of its prompt.
    house.settings |= {"default_tokens_per_minute": 31, "prefix_cache_mib": 0}
    async with house.open() as stub:
        await solution(stub, asking())
        await solution(stub, asking(problem="another"))
        error = await refusal(stub, asking(problem="a third"))
    assert isinstance(error, QuotaExceeded)
    assert "tokens_per_minute" in str(error)


async def test_what_a_caller_that_left_had_used_is_charged(house: House) -> None:
    house.settings |= {"default_tokens_per_minute": 1}
    house.router.may_answer.clear()
    async with house.open() as stub:
        # Its draft step is written, and nobody has judged it.
        call = stub.GenerateSolution(asking(arbitrage=pb.ArbitragePolicy()))
        await anext(aiter(call))
        call.cancel()
        await until(lambda: house.metric("arbitrage_solutions_running") == 0)
        error = await refusal(stub, asking())
    assert isinstance(error, QuotaExceeded)


async def test_two_houses_with_one_redis_share_a_tenants_quota(server: RedisServer) -> None:
    shared = {"default_requests_per_minute": 2, "store_url": server.url}
    async with House(settings=shared).open() as one, House(settings=shared).open() as other:
        await solution(one, asking())
        await solution(other, asking())
        for stub in (one, other):
            assert isinstance(await refusal(stub, asking()), QuotaExceeded)
        await asyncio.to_thread(server.kill)
        await solution(one, asking())


async def test_a_redis_that_was_never_there_stops_nobody() -> None:
    url = f"redis://127.0.0.1:{free_port()}"
    house = House(settings={"default_requests_per_minute": 2, "store_url": url})
    async with house.open() as stub:
        await solution(stub, asking())
        assert house.metric("arbitrage_quota_fallbacks_total") == 1


async def test_the_name_of_a_tenant_stays_out_of_redis(shared_server: RedisServer) -> None:
    async with client_of(shared_server) as client:
        buckets = RedisBuckets(linked(client), QuotaMetrics(CollectorRegistry()))
        await buckets.charge("a {secret}\n*", Limits(tokens_per_minute=100), 50)

    def everything() -> list[bytes]:
        with Redis(port=shared_server.port) as sync:
            return list(sync.scan_iter())

    assert all(b"secret" not in key for key in await asyncio.to_thread(everything))


async def test_in_a_cluster_each_tenants_key_is_asked_where_its_slot_is(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--cluster-enabled", "yes") as node:
        await asyncio.to_thread(give_all_slots, node)
        client: Any = RedisCluster.from_url(f"redis://127.0.0.1:{node.port}", driver_info=None)
        try:
            office = Office(lambda metrics: RedisBuckets(linked(client), metrics))
            quotas = office.quotas(Limits(requests_per_minute=1))
            for number in range(5):
                await quotas.admit(Caller(f"tenant {number}"))
                await refused(quotas, Caller(f"tenant {number}"))
            assert office.counted("arbitrage_quota_fallbacks_total") == 0
        finally:
            await client.aclose()
