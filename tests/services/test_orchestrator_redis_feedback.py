"""Feedback records in a real Redis: bounded, and nothing that a request waits for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from redis import Redis

from arbitrage.v1 import feedback_pb2
from arbitrage.v1 import orchestrator_pb2 as pb
from services.orchestrator.redis_feedback import RedisFeedback
from services.orchestrator.redis_link import StoreAway, opened_redis
from services.orchestrator.telemetry import StoreMetrics
from services.rpc.feedback_log import read_feedback
from services.rpc.feedback_stream import FEEDBACK_STREAM, read_feedback_stream
from services.rpc.redis_client import opened_client
from tests.services.redis_servers import RedisServer, free_port, give_all_slots, redis_server
from tests.services.running import House, asking, committed, solution, until

ARBITRAGE = pb.ArbitragePolicy()
RECORDS = "arbitrage_feedback_records_total"
EVERY_STEP = {
    "feedback_sample_rate": 1.0,
    "feedback_max_inflight": 64,
    "feedback_max_target_inflight": 64,
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as running:
        yield running


@asynccontextmanager
async def sink_at(url: str, max_bytes: int = 1 << 20) -> AsyncIterator[RedisFeedback]:
    async with opened_redis(url, StoreMetrics(CollectorRegistry()), 5.0) as link:
        yield RedisFeedback(link, max_bytes)


async def records_at(url: str) -> list[feedback_pb2.ObservedStep]:
    async with opened_client(url, timeout_s=5.0) as client:
        return [record async for record in read_feedback_stream(client)]


def house(**settings: Any) -> House:
    """Returns a house whose router accepts every draft step and that observes each."""
    house = House(settings={**EVERY_STEP, **settings})
    house.router.score, house.prm.score = 0.3, 0.8
    return house


async def observed(house: House, result: str = "written") -> None:
    """Runs a solution of three steps and waits for what became of their records."""
    async with house.open() as stub:
        assert len(committed(await solution(stub, asking(arbitrage=ARBITRAGE)))) == 3
        await until(lambda: house.metric(RECORDS, result=result) == 3)


async def test_redis_gets_the_records_that_a_folder_would(
    server: RedisServer, tmp_path: Path
) -> None:
    folder = tmp_path / "feedback"
    await observed(house(store_url=server.url))
    of_redis = await records_at(server.url)
    await observed(house(feedback_folder=folder))
    of_folder = await asyncio.to_thread(lambda: list(read_feedback(folder)))

    def lasting(records: list[feedback_pb2.ObservedStep]) -> list[feedback_pb2.ObservedStep]:
        for record in records:
            assert record.request_id
            record.ClearField("request_id")
            record.ClearField("observed_at")
        return sorted(records, key=lambda record: len(record.steps))

    assert len(of_redis) == 3
    assert lasting(of_redis) == lasting(of_folder)


async def test_where_a_folder_is_set_it_gets_the_records_alone(
    server: RedisServer, tmp_path: Path
) -> None:
    await observed(house(store_url=server.url, feedback_folder=tmp_path / "feedback"))
    assert await records_at(server.url) == []


async def test_without_a_rate_nothing_is_observed(server: RedisServer) -> None:
    idle = house(store_url=server.url, feedback_sample_rate=0.0)
    async with idle.open() as stub:
        await solution(stub, asking(arbitrage=ARBITRAGE))
    assert idle.target.call_count == 0
    assert await records_at(server.url) == []


async def test_a_redis_that_is_away_costs_records_and_no_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    await observed(house(store_url=f"redis://127.0.0.1:{free_port()}"), result="failed")
    # That is no defect.
    assert "ERROR" not in {record.levelname for record in caplog.records}


async def test_a_redis_that_is_full_costs_records_and_no_request(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--maxmemory", "1", "--maxmemory-policy", "noeviction") as full:
        await observed(house(store_url=full.url), result="failed")


async def test_the_oldest_records_make_room_for_new_ones_of_any_size(server: RedisServer) -> None:
    sizes = [100, 90_000, 5, 40_000, 60_000, 100, 100] * 6
    async with sink_at(server.url, max_bytes=200_000) as sink:
        for number, size in enumerate(sizes):
            record = feedback_pb2.ObservedStep(request_id=str(number), problem="x" * size)
            await sink.append(record)
    kept = await records_at(server.url)
    # What is left are the newest, without a gap, and no more of them than fill the bound.
    assert [int(record.request_id) for record in kept] == list(
        range(len(sizes) - len(kept), len(sizes))
    )
    bytes_kept = [record.ByteSize() for record in kept]
    assert sum(bytes_kept[1:]) < 200_000 <= sum(bytes_kept)

    def memory() -> int:
        with Redis(port=server.port) as client:
            return int(client.memory_usage(FEEDBACK_STREAM, samples=0) or 0)

    assert await asyncio.to_thread(memory) < 400_000


async def test_a_record_larger_than_the_bound_is_kept_alone(server: RedisServer) -> None:
    async with sink_at(server.url, max_bytes=10) as sink:
        for number in range(3):
            record = feedback_pb2.ObservedStep(request_id=str(number), problem="x" * 50)
            await sink.append(record)
    assert [record.request_id for record in await records_at(server.url)] == ["2"]


async def test_a_stream_that_nobody_adds_to_goes_in_the_end(server: RedisServer) -> None:
    async with sink_at(server.url) as sink:
        await sink.append(feedback_pb2.ObservedStep())

    def left_s() -> int:
        with Redis(port=server.port) as client:
            return int(client.ttl(FEEDBACK_STREAM))

    assert 6.9 * 86_400 < await asyncio.to_thread(left_s) <= 7 * 86_400


async def test_more_records_than_one_look_returns_are_read_in_their_order(
    server: RedisServer,
) -> None:
    async with sink_at(server.url) as sink:
        for number in range(201):
            await sink.append(feedback_pb2.ObservedStep(request_id=str(number)))
    assert [int(record.request_id) for record in await records_at(server.url)] == list(range(201))


async def test_a_cluster_keeps_records_too(tmp_path: Path) -> None:
    with redis_server(tmp_path, "--cluster-enabled", "yes") as node:
        await asyncio.to_thread(give_all_slots, node)
        url = f"redis+cluster://127.0.0.1:{node.port}"
        async with sink_at(url) as sink:
            await sink.append(feedback_pb2.ObservedStep(problem="1 + 1?"))
        assert [record.problem for record in await records_at(url)] == ["1 + 1?"]


async def test_what_redis_refuses_is_an_error_of_the_sink(server: RedisServer) -> None:
    def taken() -> None:
        with Redis(port=server.port) as client:
            client.set(FEEDBACK_STREAM, "a text")

    await asyncio.to_thread(taken)
    async with sink_at(server.url) as sink:
        with pytest.raises(StoreAway, match="Redis refuses"):
            await sink.append(feedback_pb2.ObservedStep())
