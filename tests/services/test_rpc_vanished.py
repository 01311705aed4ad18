"""Replicas that vanish without a word, as hosts do that lose their power or their network."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import count

import grpc
import pytest

from arbitrage.core.errors import TargetUnavailable
from services.generator.servicer import GeneratorServicer
from services.rpc.calls import CallLimits, key_of
from services.rpc.clients import GrpcGenerator
from services.rpc.pool import Pool, open_channel, opened_pool
from tests.services.fakes_engines import FakeGeneratorEngine, numbered
from tests.services.running import GENERATOR, serving, until
from tests.services.test_rpc_pool import asking, step_of
from tests.services.wires import Wire

# More than servers allow, and little more.
KEEPALIVE_S = 1.1
quick = partial(open_channel, keepalive_s=KEEPALIVE_S)


def asked_first_at(pool: Pool, address: str) -> int:
    """Returns the number of a problem that a replica is asked for before any other."""
    for number in count():
        chosen = pool.choose(key_of(asking(number).trajectory.problem))
        if chosen is not None and chosen.address == address:
            return number
    raise AssertionError("there are as many as it takes")


async def test_a_step_whose_host_vanishes_comes_from_another_long_before_its_time_is_over() -> None:
    vanishing = FakeGeneratorEngine()
    vanishing.may_answer.clear()
    other = FakeGeneratorEngine(write=numbered("target", 1))
    async with (
        serving(GENERATOR, GeneratorServicer(vanishing, 8)) as first,
        serving(GENERATOR, GeneratorServicer(other, 8)) as second,
        Wire(first.port).laid() as wire,
        opened_pool("target", f"{wire.address},{second.address}", quick) as pool,
        asyncio.timeout(60),
        asyncio.TaskGroup() as group,
    ):
        generator = GrpcGenerator(pool, TargetUnavailable, CallLimits(timeout_s=600.0))
        number = asked_first_at(pool, wire.address)
        running = group.create_task(step_of(generator, asking(number)))
        await until(lambda: vanishing.call_count)
        wire.cut()
        assert (await running).text == "target 0"


async def test_a_server_may_be_asked_often_whether_it_is_there() -> None:
    engine = FakeGeneratorEngine()
    async with (
        serving(GENERATOR, GeneratorServicer(engine, 8)) as server,
        quick(server.address) as channel,
    ):
        pool = Pool("target", server.address, lambda address, name: channel)
        await pool.resolve()
        generator = GrpcGenerator(pool, TargetUnavailable, CallLimits(timeout_s=60.0))
        await step_of(generator, asking(1))
        # gRPC forgives two questions too many.
        await asyncio.sleep(6 * KEEPALIVE_S)
        assert channel.get_state() is grpc.ChannelConnectivity.READY


@contextmanager
def unanswering_port() -> Iterator[str]:
    """Holds a port where nobody takes the connections, and no more of them find room."""
    with ExitStack() as stack:
        hole = stack.enter_context(socket.socket())
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            with suppress(BlockingIOError):
                waiting.connect(hole.getsockname())
        yield f"127.0.0.1:{hole.getsockname()[1]}"


async def test_a_host_that_takes_no_connection_is_given_up_long_before_a_calls_time_is_over() -> (
    None
):
    with unanswering_port() as address:
        async with opened_pool("target", address) as pool, asyncio.timeout(30):
            generator = GrpcGenerator(pool, TargetUnavailable, CallLimits(timeout_s=600.0))
            with pytest.raises(TargetUnavailable):
                await step_of(generator, asking(1))
