"""Pools of replicas over real gRPC: who is asked, who is left out, and what a failure costs."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from pathlib import Path

import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from arbitrage.core.errors import DeadlineExceeded, NotServing, Overloaded, TargetUnavailable
from arbitrage.core.ports import StepRequest
from arbitrage.core.steps import GeneratedStep, Sampling, Trajectory
from arbitrage.v1 import generator_pb2
from services.generator.servicer import GeneratorServicer
from services.rpc.addresses import listed, looked_up
from services.rpc.calls import CallLimits, key_of
from services.rpc.clients import GrpcGenerator
from services.rpc.handlers import Context
from services.rpc.pool import Pool, Replica, open_channel, opened_pool
from services.rpc.server import Listener, RpcServer
from services.rpc.telemetry import PoolMetrics, Telemetry
from tests.services.fakes_engines import FakeGeneratorEngine, numbered
from tests.services.redis_servers import free_port
from tests.services.running import GENERATOR, serving, until


class Crew:
    """Replicas of one target, each with an engine of its own, and a pool that knows them."""

    def __init__(self, folder: Path, hedge_quantile: float = 0.0) -> None:
        self._hedge_quantile = hedge_quantile
        self.engines: dict[str, FakeGeneratorEngine] = {}
        self.servers: dict[str, RpcServer] = {}
        self.registry = CollectorRegistry()
        self.list = folder / "replicas"
        self.pool: Pool
        self._stack = AsyncExitStack()

    @property
    def generator(self) -> GrpcGenerator:
        return GrpcGenerator(self.pool, TargetUnavailable, CallLimits(20.0))

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, {"role": "target", **labels}) or 0.0

    def asked_first(self, request: StepRequest) -> str:
        chosen = self.pool.choose(key_of(request.trajectory.problem))
        assert chosen is not None
        return chosen.address

    async def join(self, port: int = 0) -> str:
        """Starts a replica, and returns its address."""
        engine = FakeGeneratorEngine(write=numbered("target", 3))
        server = RpcServer(GENERATOR, Listener("127.0.0.1", port), Telemetry())
        await server.start()
        await server.open(GeneratorServicer(engine, 256))
        self._stack.push_async_callback(server.stop)
        self.engines[server.address], self.servers[server.address] = engine, server
        self.write_list()
        return server.address

    def write_list(self, *without: str) -> None:
        self.list.write_text("\n".join(set(self.servers) - set(without)))

    async def solve(self, problem_count: int) -> None:
        for number in range(problem_count):
            await step_of(self.generator, asking(number))

    @asynccontextmanager
    async def open(self, size: int) -> AsyncIterator[None]:
        async with self._stack:
            for _ in range(size):
                await self.join()
            metrics = PoolMetrics(self.registry)
            address = f"file://{self.list}"
            async with opened_pool(
                "target",
                address,
                metrics=metrics,
                interval_s=0.05,
                hedge_quantile=self._hedge_quantile,
            ) as pool:
                self.pool = pool
                yield


@pytest.fixture
def crew(tmp_path: Path) -> Crew:
    return Crew(tmp_path)


def asking(number: int, **fields: object) -> StepRequest:
    return StepRequest(Trajectory(f"problem {number}"), max_tokens=8, **fields)  # type: ignore[arg-type]


async def step_of(generator: GrpcGenerator, request: StepRequest) -> GeneratedStep:
    (step,) = [item async for item in generator.generate_step(request)]
    assert isinstance(step, GeneratedStep)
    return step


def replicas(size: int) -> tuple[Replica, ...]:
    return tuple(Replica(f"10.0.0.{n}:1", None) for n in range(size))  # type: ignore[arg-type]


@given(st.integers(1, 6), st.lists(st.binary(min_size=4, max_size=8), min_size=1, unique=True))
def test_a_replica_that_joins_takes_requests_and_moves_no_other(
    size: int, keys: list[bytes]
) -> None:
    pool = Pool("target", "nowhere")
    before, newcomer = replicas(size), replicas(size + 1)[-1]
    for key in keys:
        pool.replicas = before
        first = pool.choose(key)
        pool.replicas = (*before, newcomer)
        assert pool.choose(key) in (first, newcomer)


def test_every_replica_gets_its_share() -> None:
    pool = Pool("target", "nowhere")
    pool.replicas = replicas(4)
    counts: dict[Replica | None, int] = {}
    for number in range(1000):
        chosen = pool.choose(key_of(str(number)))
        counts[chosen] = counts.get(chosen, 0) + 1
    assert set(counts) == set(pool.replicas)
    assert min(counts.values()) > 200


@given(st.integers(2, 5), st.lists(st.sampled_from([b"hot", b"cold"]), max_size=40))
def test_no_replica_has_more_than_its_share_of_the_calls_in_flight(
    size: int, keys: list[bytes]
) -> None:
    pool = Pool("target", "nowhere")
    pool.replicas = replicas(size)
    for total, key in enumerate(keys, start=1):
        chosen = pool.choose(key)
        assert chosen is not None
        chosen.inflight_count += 1
        assert chosen.inflight_count <= 1.25 * total / size + 1


async def test_all_steps_of_a_problem_go_to_one_replica(crew: Crew) -> None:
    async with crew.open(3):
        for _ in range(5):
            await step_of(crew.generator, asking(1))
        assert sorted(engine.call_count for engine in crew.engines.values()) == [0, 0, 5]


async def test_a_newcomer_gets_its_share_within_moments(crew: Crew) -> None:
    async with crew.open(3):
        await crew.solve(30)
        newcomer = await crew.join()
        await until(lambda: len(crew.pool.replicas) == 4)
        await crew.solve(100)
        assert crew.engines[newcomer].call_count >= 15


async def test_one_that_is_taken_off_the_list_ends_what_it_has_begun(crew: Crew) -> None:
    async with crew.open(3):
        leaver = crew.asked_first(asking(1))
        crew.engines[leaver].may_answer.clear()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(step_of(crew.generator, asking(1)))
            await until(lambda: crew.engines[leaver].call_count == 1)
            crew.write_list(leaver)
            await until(lambda: len(crew.pool.replicas) == 2)
            await step_of(crew.generator, asking(1))
            crew.engines[leaver].may_answer.set()
        assert running.result().text == "target 0"
        assert crew.engines[leaver].call_count == 1


async def test_a_step_whose_replica_dies_comes_from_another(crew: Crew) -> None:
    async with crew.open(3):
        victim = crew.asked_first(asking(1))
        crew.engines[victim].may_answer.clear()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(step_of(crew.generator, asking(1)))
            await until(lambda: crew.engines[victim].call_count == 1)
            await crew.servers[victim].stop()
        assert running.result().text == "target 0"
        assert crew.metric("arbitrage_pool_retries_total") == 1
        assert crew.metric("arbitrage_pool_replicas", state="ejected") == 1
        # Nobody asks it again while it is gone.
        await crew.solve(20)
        assert crew.metric("arbitrage_pool_retries_total") == 1


class Breaking:
    """Writes the beginning of a step and is gone."""

    def __init__(self, *texts: str) -> None:
        self._texts = texts

    async def GenerateStep(  # noqa: N802 - the proto's name
        self, request: generator_pb2.GenerateStepRequest, context: Context
    ) -> AsyncGenerator[generator_pb2.GenerateStepResponse, None]:
        for text in self._texts:
            yield generator_pb2.GenerateStepResponse(text_delta=text)
        raise NotServing("gone")


@asynccontextmanager
async def broken_and_whole(*texts: str) -> AsyncIterator[tuple[GrpcGenerator, int]]:
    """Serves a replica that breaks and one that does not, and finds who asks the former first."""
    async with (
        serving(GENERATOR, Breaking(*texts)) as broken,
        serving(
            GENERATOR, GeneratorServicer(FakeGeneratorEngine(write=numbered("target", 1)), 8)
        ) as whole,
        opened_pool("target", f"{broken.address},{whole.address}") as pool,
    ):
        for number in count():
            chosen = pool.choose(key_of(asking(number).trajectory.problem))
            if chosen is not None and chosen.address == broken.address:
                yield GrpcGenerator(pool, TargetUnavailable), number
                return


async def test_text_that_was_streamed_is_not_streamed_again_by_another_replica() -> None:
    async with broken_and_whole("tar", "ge") as (generator, number):
        items = [item async for item in generator.generate_step(asking(number, stream_text=True))]
    # The second replica's deltas are "target" and "0", cut at other places than the first's.
    assert items[:-1] == ["tar", "ge", "t", "0"]
    assert isinstance(items[-1], GeneratedStep)


async def test_text_of_a_replica_that_writes_otherwise_is_not_put_behind_the_first_ones() -> None:
    async with broken_and_whole("M", "y") as (generator, number):
        items = [item async for item in generator.generate_step(asking(number, stream_text=True))]
    assert items[:-1] == ["M", "y"]
    assert isinstance(items[-1], GeneratedStep)
    assert items[-1].text == "target 0"


async def test_streamed_text_that_could_differ_is_not_begun_anew() -> None:
    async with broken_and_whole("tar", "ge") as (generator, number):
        request = asking(number, stream_text=True, sampling=Sampling(temperature=1.0))
        with pytest.raises(TargetUnavailable):
            async for _ in generator.generate_step(request):
                pass


async def test_one_that_drains_is_passed_over_at_no_cost(crew: Crew) -> None:
    async with crew.open(2):
        leaver = crew.asked_first(asking(1))
        await crew.servers[leaver].drain(0.01)
        step = await step_of(crew.generator, asking(1))
        assert step.text == "target 0"
        assert crew.metric("arbitrage_pool_retries_total") == 0
        assert crew.engines[leaver].call_count == 0


async def test_without_a_replica_a_call_fails_at_once_and_one_that_is_back_is_used(
    crew: Crew,
) -> None:
    async with crew.open(1):
        (address,) = crew.servers
        port = crew.servers[address].port
        await crew.servers[address].stop()
        for _ in range(2):
            with pytest.raises(TargetUnavailable):
                await step_of(crew.generator, asking(1))
        assert crew.metric("arbitrage_pool_replicas", state="ready") == 0
        await crew.join(port)
        await until(lambda: crew.metric("arbitrage_pool_replicas", state="ready") == 1)
        assert (await step_of(crew.generator, asking(1))).text == "target 0"


async def test_a_failing_pool_does_not_multiply_its_load(crew: Crew) -> None:
    async with crew.open(2):
        budget = 0
        while crew.pool.may_retry():
            budget += 1
        assert budget == 10
        victim = crew.asked_first(asking(1))
        await crew.servers[victim].stop()
        with pytest.raises(TargetUnavailable):
            await step_of(crew.generator, asking(1))


async def test_an_overloaded_replica_passes_the_step_on(crew: Crew) -> None:
    async with crew.open(2):
        busy = crew.asked_first(asking(1))
        crew.engines[busy].error = Overloaded("full", retry_after_s=60.0)
        assert (await step_of(crew.generator, asking(1))).text == "target 0"
        assert crew.metric("arbitrage_pool_replicas", state="ejected") == 0


async def test_a_replica_that_says_that_its_time_is_over_is_not_ejected(crew: Crew) -> None:
    async with crew.open(2):
        slow = crew.asked_first(asking(1))
        crew.engines[slow].error = DeadlineExceeded("the engine behind took longer than it may")
        assert (await step_of(crew.generator, asking(1))).text == "target 0"
        assert crew.metric("arbitrage_pool_ejections_total") == 0


async def test_a_replica_that_says_nothing_in_any_calls_time_is_ejected(crew: Crew) -> None:
    async with crew.open(2):
        silent = crew.asked_first(asking(1))
        crew.engines[silent].may_answer.clear()
        generator = GrpcGenerator(crew.pool, TargetUnavailable, CallLimits(0.2))
        with pytest.raises(TargetUnavailable):
            await step_of(generator, asking(1))
        assert crew.metric("arbitrage_pool_ejections_total") == 1


async def test_a_call_that_is_given_up_is_in_flight_no_more(crew: Crew) -> None:
    async with crew.open(2):
        for engine in crew.engines.values():
            engine.may_answer.clear()
        running = asyncio.create_task(step_of(crew.generator, asking(1)))
        await until(lambda: sum(engine.call_count for engine in crew.engines.values()))
        running.cancel()
        await asyncio.wait([running])
        assert [replica.inflight_count for replica in crew.pool.replicas] == [0, 0]


async def test_a_replica_that_moves_while_it_is_waited_for_is_found_where_it_is(
    tmp_path: Path,
) -> None:
    addresses = tmp_path / "replicas"
    with socket.socket() as frozen:
        # It takes connections and says nothing.
        frozen.bind(("127.0.0.1", 0))
        frozen.listen()
        addresses.write_text(f"127.0.0.1:{frozen.getsockname()[1]}")
        async with (
            serving(GENERATOR, GeneratorServicer(FakeGeneratorEngine(), 8)) as server,
            opened_pool("target", f"file://{addresses}", interval_s=0.05) as pool,
            asyncio.timeout(30),
        ):
            waiting = asyncio.create_task(pool.wait_until_serving(""))
            await asyncio.sleep(0.2)
            addresses.write_text(server.address)
            await waiting


async def test_a_list_that_is_gone_or_empty_changes_nothing(crew: Crew) -> None:
    async with crew.open(2):
        crew.list.write_text("")
        await crew.pool.resolve()
        crew.list.unlink()
        await crew.pool.resolve()
        assert len(crew.pool.replicas) == 2


async def test_channels_are_opened_anew_without_losing_a_call(crew: Crew) -> None:
    async with crew.open(2):
        before = crew.pool.replicas
        await crew.solve(3)
        await crew.pool.resolve(anew=True)
        assert not set(before) & set(crew.pool.replicas)
        await crew.solve(3)


async def test_addresses_are_names_lists_or_files(tmp_path: Path) -> None:
    assert await listed("127.0.0.1:1,[::1]:2") == ("127.0.0.1:1", "[::1]:2")
    assert await looked_up("[::1]:2") == {"[::1]:2": ""}
    # One kind of address alone, though a host may have both.
    assert await looked_up("localhost:7") == {"127.0.0.1:7": "localhost"}
    with pytest.raises(OSError, match=r"\w"):
        await listed(f"file://{tmp_path}/nowhere")


async def test_what_cannot_be_looked_up_keeps_no_other_from_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listing = tmp_path / "replicas"
    listing.write_bytes(b"nowhere.invalid:1\n127.0.0.1:99999\n\xff\n127.0.0.1:1\nlocalhost:2\n")
    pool = Pool("target", f"file://{listing}")
    for _ in range(2):
        await pool.resolve()
        assert [replica.address for replica in pool.replicas] == ["127.0.0.1:1", "127.0.0.1:2"]
    # Each is told of once, and not at every look.
    assert len(caplog.records) == 3
    await pool.close()


async def test_a_channel_connects_to_the_server_behind_it() -> None:
    async with (
        serving(GENERATOR, GeneratorServicer(FakeGeneratorEngine(), 8)) as server,
        open_channel(server.address) as channel,
    ):
        await asyncio.wait_for(channel.channel_ready(), 20)
    async with open_channel(f"127.0.0.1:{free_port()}") as channel:
        assert channel.get_state() is grpc.ChannelConnectivity.IDLE
