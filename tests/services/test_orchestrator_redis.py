"""The prefix cache in a real Redis: shared, bounded in time, and never in the way."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from redis import Redis

from arbitrage.v1 import orchestrator_pb2 as pb
from services.orchestrator.redis_link import opened_redis
from services.orchestrator.redis_store import RedisStore
from services.orchestrator.telemetry import StoreMetrics
from services.rpc.background import in_background
from services.rpc.program import StartError
from services.rpc.redis_client import redacted
from tests.services.fakes_engines import FakeEngine
from tests.services.redis_servers import RedisServer, free_port, give_all_slots, redis_server
from tests.services.running import House, Solution, asking, committed, solution, until


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as running:
        yield running


@asynccontextmanager
async def store_at(
    url: str, timeout_s: float = 5.0
) -> AsyncIterator[tuple[RedisStore, CollectorRegistry]]:
    registry = CollectorRegistry()
    async with opened_redis(url, StoreMetrics(registry), timeout_s) as link:
        store = RedisStore(link)
        async with in_background(store.maintain()):
            yield store, registry


async def put(store: RedisStore, key: bytes, value: bytes, ttl_s: float) -> None:
    """Keeps an answer and waits until it is written."""
    store.put(key, value, ttl_s)
    await store.written()


async def test_what_one_orchestrator_puts_another_finds(server: RedisServer) -> None:
    async with store_at(server.url) as (one, _), store_at(server.url) as (other, _):
        assert await other.find(b"key") is None
        await put(one, b"key", b"\x00value", ttl_s=60.0)
        assert await other.find(b"key") == b"\x00value"


async def test_every_entry_has_its_time_to_live(server: RedisServer) -> None:
    async with store_at(server.url) as (store, _):
        await put(store, b"key", b"value", ttl_s=60.0)
        await put(store, b"short", b"value", ttl_s=0.0001)
        await asyncio.sleep(0.05)
        assert await store.find(b"short") is None

    def times() -> list[int]:
        with Redis(port=server.port) as client:
            return [client.pttl(key) for key in client.scan_iter()]

    (left_ms,) = await asyncio.to_thread(times)
    assert 50_000 < left_ms <= 60_000


async def test_a_server_that_dies_is_passed_by_and_used_again_when_it_is_back(
    server: RedisServer,
) -> None:
    async with store_at(server.url) as (store, registry):
        await put(store, b"key", b"value", 60.0)
        await asyncio.to_thread(server.kill)
        assert await store.find(b"key") is None
        await put(store, b"key", b"value", 60.0)
        assert registry.get_sample_value("arbitrage_store_up") == 0
        # One question met the failure; the next was not asked.
        assert _failures(registry) == 1
        await asyncio.to_thread(server.start)
        async with asyncio.timeout(20):
            while await store.find(b"key") is None:
                await put(store, b"key", b"again", 60.0)
                await asyncio.sleep(0.05)
        assert await store.find(b"key") == b"again"
        assert registry.get_sample_value("arbitrage_store_up") == 1


async def test_a_server_that_hangs_costs_one_wait_and_not_one_for_each(server: RedisServer) -> None:
    async with store_at(server.url, timeout_s=0.25) as (store, registry):
        await put(store, b"key", b"value", 60.0)
        assert server.process is not None
        server.process.send_signal(signal.SIGSTOP)
        try:
            assert await asyncio.gather(*(store.find(b"key") for _ in range(20))) == [None] * 20
            for _ in range(20):
                assert await store.find(b"key") is None
        finally:
            server.process.send_signal(signal.SIGCONT)
        # The twenty that went together; none of those after them was asked.
        assert _failures(registry) == 20


async def test_a_full_server_is_not_written_to_and_still_read(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--maxmemory", "3mb", "--maxmemory-policy", "noeviction") as full:
        async with store_at(full.url) as (store, registry):
            await put(store, b"first", b"value", 60.0)
            for number in range(10):
                await put(store, b"%d" % number, b"x" * 1_000_000, 60.0)
            assert registry.get_sample_value("arbitrage_store_failures_total", {"operation": "put"})
            assert await store.find(b"first") == b"value"
            assert registry.get_sample_value("arbitrage_store_up") == 1


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
async def test_a_server_that_is_away_is_no_reason_not_to_start(scheme: str) -> None:
    async with store_at(f"{scheme}://127.0.0.1:{free_port()}") as (store, _):
        await put(store, b"key", b"value", 60.0)
        assert await store.find(b"key") is None


async def test_a_user_with_few_rights_is_enough_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    rights = "~arbitrage:* -@all +get +set +del +eval +evalsha +ping"
    acl = f"--user orchestrator on >secret {rights} --user default off"
    with redis_server(tmp_path, *acl.split()) as guarded:
        address = f"127.0.0.1:{guarded.port}"
        async with store_at(f"redis://orchestrator:secret@{address}") as (store, _):
            await put(store, b"key", b"value", 60.0)
            assert await store.find(b"key") == b"value"
        with pytest.raises(StartError, match="refuses user or password") as refused:
            async with store_at(f"redis://orchestrator:wrong-one@{address}"):
                pass
        assert "wrong-one" not in str(refused.value)


async def test_sentinels_name_the_primary(tmp_path: Path, server: RedisServer) -> None:
    port = free_port()
    config = tmp_path / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 {server.port} 1\n"
    )
    sentinel = RedisServer(tmp_path, (str(config), "--sentinel"), port, is_bare=True)
    await asyncio.to_thread(sentinel.start)
    try:
        async with store_at(f"redis+sentinel://127.0.0.1:{port}/main") as (store, _):
            await put(store, b"key", b"value", 60.0)
            assert await store.find(b"key") == b"value"
    finally:
        await asyncio.to_thread(sentinel.kill)


async def test_a_cluster_keeps_each_key_where_its_slot_is(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--cluster-enabled", "yes") as node:
        await asyncio.to_thread(give_all_slots, node)
        async with store_at(f"redis+cluster://127.0.0.1:{node.port}") as (store, _):
            await put(store, b"key", b"value", 60.0)
            assert await store.find(b"key") == b"value"
            # Its errors are no errors of one server, and end nothing either.
            await asyncio.to_thread(node.kill)
            await put(store, b"key", b"value", 60.0)
            assert await store.find(b"key") is None


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1", "expected one of redis://"),
        ("redis+sentinel://127.0.0.1/main", "host:port"),
        ("redis+sentinel://127.0.0.1:1", "/mymaster"),
        ("redis://127.0.0.1:many", "ARBITRAGE_STORE_URL"),
        ("redis://127.0.0.1:1?foo=bar", "foo"),
        ("redis://127.0.0.1:1/abc", "number of a database"),
        ("unix://", "the socket's path"),
        ("redis+cluster://127.0.0.1:1?foo=bar", "foo"),
        ("redis+sentinel://127.0.0.1:1/main?foo=bar", "foo"),
    ],
)
async def test_a_url_that_is_none_is_refused(url: str, said: str) -> None:
    with pytest.raises(StartError, match=said):
        async with store_at(url):
            pass


def test_a_url_is_shown_without_its_secrets() -> None:
    assert redacted("rediss+sentinel://u:p@a:1,b:2/main") == "rediss+sentinel://a:1,b:2/main"


async def test_a_problem_that_one_orchestrator_solved_costs_another_no_model_call(
    server: RedisServer,
) -> None:
    one = House(settings={"store_url": server.url})
    other = House(settings={"store_url": server.url})
    async with one.open() as stub, other.open() as second:
        known = await solution(stub, asking())
        await asyncio.sleep(0.5)  # it asks the draft what it is
        again = await solution(second, asking())
    assert _texts(again) == _texts(known)
    assert len(other.draft.requests) == 0
    assert len(one.draft.requests) > 1


async def test_equal_calls_of_two_orchestrators_make_one(server: RedisServer) -> None:
    one = House(settings={"store_url": server.url})
    other = House(settings={"store_url": server.url})
    async with one.open() as stub, other.open() as second:
        one.draft.may_answer.clear()
        other.draft.may_answer.clear()
        async with asyncio.TaskGroup() as group:
            first = group.create_task(solution(stub, asking()))
            await until(lambda: one.draft.call_count == 1)
            again = group.create_task(solution(second, asking()))
            await asyncio.sleep(0.3)
            assert other.draft.call_count == 0
            one.draft.may_answer.set()
            other.draft.may_answer.set()
    assert _texts(first.result()) == _texts(again.result())


async def test_two_orchestrators_with_one_call_ask_every_question_once(
    server: RedisServer,
) -> None:
    houses = [House(settings={"store_url": server.url}) for _ in range(2)]
    for house in houses:
        for engine in (house.draft, house.router, house.target):
            take_time(engine)
    call = asking(arbitrage=pb.ArbitragePolicy())
    async with (
        houses[0].open() as stub,
        houses[1].open() as second,
        asyncio.TaskGroup() as group,
    ):
        first = group.create_task(solution(stub, call))
        await until(lambda: houses[0].draft.requests)
        again = group.create_task(solution(second, call))
    assert _texts(first.result()) == _texts(again.result()) == ["target 0", "target 1", "target 2"]
    assert [house.draft.call_count for house in houses] == [3, 0]
    assert [house.router.call_count for house in houses] == [3, 0]
    assert [house.target.call_count for house in houses] == [3, 0]


async def test_a_claim_without_a_look_yields_to_an_answer_and_to_the_claim_of_another(
    server: RedisServer,
) -> None:
    async with store_at(server.url) as (one, _), store_at(server.url) as (other, _):
        one.claim_unseen(b"key")
        await one.written()
        other.claim_unseen(b"key")
        await other.written()
        assert await other.claim(b"key") is False
        # What is said later arrives later: no claim is left behind.
        one.claim_unseen(b"key")
        one.release(b"key")
        await one.written()
        assert await other.claim(b"key") is True
        await put(other, b"key", b"value", 60.0)
        one.claim_unseen(b"key")
        await one.written()
        assert await other.claim(b"key") == b"value"


async def test_the_claim_of_an_orchestrator_that_dies_is_free_after_a_moment(
    server: RedisServer,
) -> None:
    async with store_at(server.url) as (other, _):
        async with store_at(server.url) as (one, _):
            assert await one.claim(b"key") is True
            assert await other.claim(b"key") is False
        # Nobody renews it.
        async with asyncio.timeout(20):
            while await other.claim(b"key") is False:  # noqa: ASYNC110 - no event tells of it
                await asyncio.sleep(0.05)


async def test_what_a_slow_orchestrator_finds_out_in_the_end_is_an_answer_like_any_other(
    server: RedisServer,
) -> None:
    async with store_at(server.url) as (one, _), store_at(server.url) as (other, _):
        assert await other.claim(b"key") is True
        assert await one.claim(b"key") is False
        await put(one, b"key", b"value", 60.0)
        assert await other.claim(b"key") == b"value"


async def test_a_claim_that_is_renewed_lasts_and_one_that_is_given_up_is_free(
    server: RedisServer,
) -> None:
    async with store_at(server.url) as (one, _), store_at(server.url) as (other, _):
        assert await one.claim(b"key") is True
        await asyncio.sleep(2.5)
        assert await other.claim(b"key") is False
        one.release(b"key")
        await one.written()
        assert await other.claim(b"key") is True


async def test_more_answers_than_redis_can_take_hold_up_no_step(server: RedisServer) -> None:
    async with opened_redis(server.url, StoreMetrics(CollectorRegistry()), 5.0) as link:
        store = RedisStore(link)
        # Nobody writes yet, so most of it finds no room.
        for number in range(1_000):
            store.put(b"%d" % number, b"value", 60.0)
        async with in_background(store.maintain()):
            await store.written()
            assert await store.find(b"0") == b"value"
            assert await store.find(b"999") is None
            await put(store, b"999", b"value", 60.0)
            assert await store.find(b"999") == b"value"


async def test_no_step_waits_until_its_answer_is_written(server: RedisServer) -> None:
    async with store_at(server.url) as (store, _):
        assert await store.claim(b"key") is True
        assert server.process is not None
        server.process.send_signal(signal.SIGSTOP)
        try:
            store.put(b"key", b"value", 60.0)
        finally:
            server.process.send_signal(signal.SIGCONT)
        await store.written()
        assert await store.find(b"key") == b"value"


def take_time(engine: FakeEngine) -> None:
    """Lets an engine answer a moment later than it could."""
    answer = engine.answer

    async def later() -> None:
        await asyncio.sleep(0.15)
        await answer()

    engine.answer = later  # type: ignore[method-assign]


def _texts(events: Solution) -> list[str]:
    return [committed_step.step.text for committed_step in committed(events)]


def _failures(registry: CollectorRegistry) -> float:
    found = [
        registry.get_sample_value("arbitrage_store_failures_total", {"operation": operation})
        for operation in ("get", "put")
    ]
    return sum(value or 0.0 for value in found)
