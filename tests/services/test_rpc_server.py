"""A server: when it serves, what it refuses, how it ends, and what it counts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from arbitrage.core.errors import (
    DeadlineExceeded,
    Internal,
    MalformedMessage,
    NotServing,
    TargetUnavailable,
)
from arbitrage.status import from_rpc_error
from arbitrage.v1 import generator_pb2, generator_pb2_grpc
from services.rpc.gate import Gate
from services.rpc.handlers import Context
from services.rpc.server import Listener, PortTaken, RpcServer
from services.rpc.telemetry import MetricsEndpoint, Telemetry
from tests.services.running import GENERATOR, bytes_stream, http_answer, serving, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SECRET = "the secret problem"


class SlowServicer:
    """Sends a delta, waits until it may go on, then sends the step; fails where it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.may_end = asyncio.Event()
        self.has_ended = asyncio.Event()

    async def GenerateStep(  # noqa: N802 - the proto's name
        self, request: generator_pb2.GenerateStepRequest, context: Context
    ) -> AsyncGenerator[generator_pb2.GenerateStepResponse, None]:
        try:
            yield generator_pb2.GenerateStepResponse(text_delta="a")
            if self.error is not None:
                raise self.error
            await self.may_end.wait()
            yield generator_pb2.GenerateStepResponse(result=generator_pb2.GeneratedStep(text="a"))
        finally:
            self.has_ended.set()

    async def GetGenerator(  # noqa: N802 - the proto's name
        self, request: generator_pb2.GetGeneratorRequest, context: Context
    ) -> generator_pb2.GetGeneratorResponse:
        if self.error is not None:
            raise self.error
        return generator_pb2.GetGeneratorResponse(max_context_tokens=7)


class EndlessServicer:
    """Sends large deltas for as long as somebody takes them."""

    def __init__(self) -> None:
        self.sent_count = 0
        self.ended_count = 0

    async def GenerateStep(  # noqa: N802 - the proto's name
        self, request: generator_pb2.GenerateStepRequest, context: Context
    ) -> AsyncGenerator[generator_pb2.GenerateStepResponse, None]:
        try:
            while True:
                self.sent_count += 1
                yield generator_pb2.GenerateStepResponse(text_delta="a" * (1 << 20))
        finally:
            self.ended_count += 1


def a_server(telemetry: Telemetry | None = None) -> RpcServer:
    """Returns a server on a free port that is not started."""
    return RpcServer(GENERATOR, Listener("127.0.0.1", 0), telemetry or Telemetry())


def generator(channel: grpc.aio.Channel) -> generator_pb2_grpc.GeneratorServiceAsyncStub:
    """Returns a stub."""
    return generator_pb2_grpc.GeneratorServiceStub(channel)


async def health_of(channel: grpc.aio.Channel, service: str = "") -> int:
    """Returns what the health service says."""
    request = health_pb2.HealthCheckRequest(service=service)
    answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
    return int(answer.status)


async def test_a_server_serves_once_it_is_opened_and_until_it_drains() -> None:
    server = a_server()
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        for service in ("", GENERATOR.full_name):
            assert await health_of(channel, service) == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await generator(channel).GetGenerator(generator_pb2.GetGeneratorRequest())
        assert isinstance(from_rpc_error(raised.value), NotServing)

        await server.open(SlowServicer())
        for service in ("", GENERATOR.full_name):
            assert await health_of(channel, service) == SERVING
        answer = await generator(channel).GetGenerator(generator_pb2.GetGeneratorRequest())
        assert answer.max_context_tokens == 7

        await server.drain(5.0)
        assert await health_of(channel) == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await generator(channel).GetGenerator(generator_pb2.GetGeneratorRequest())
        assert isinstance(from_rpc_error(raised.value), NotServing)
    await server.stop()


async def test_draining_lets_a_running_call_end() -> None:
    servicer = SlowServicer()
    async with (
        serving(GENERATOR, servicer) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        call = generator(channel).GenerateStep(generator_pb2.GenerateStepRequest())
        messages = aiter(call)
        await anext(messages)
        async with asyncio.TaskGroup() as group:
            draining = group.create_task(server.drain(20.0))
            await until(lambda: not server.gate.is_open)
            assert not draining.done()
            servicer.may_end.set()
        assert (await anext(messages)).result.text == "a"
        assert await call.code() is grpc.StatusCode.OK


async def test_a_health_watcher_does_not_hold_up_the_drain() -> None:
    async with (
        serving(GENERATOR, SlowServicer()) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        watch = aiter(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()))
        assert (await anext(watch)).status == SERVING
        async with asyncio.timeout(20):
            await server.drain(1000.0)
        assert (await anext(watch)).status == NOT_SERVING


async def test_calls_that_outlast_the_grace_end_before_what_they_run_on_is_taken_down() -> None:
    servicer = SlowServicer()
    async with (
        serving(GENERATOR, servicer) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        messages = aiter(generator(channel).GenerateStep(generator_pb2.GenerateStepRequest()))
        await anext(messages)
        await server.drain(0.01)
        assert servicer.has_ended.is_set()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await anext(messages)
    error = from_rpc_error(raised.value, TargetUnavailable)
    # With a reason of its own, and not just the code, which would be the caller's target.
    assert isinstance(error, NotServing)


async def test_a_caller_that_goes_away_ends_its_servicer() -> None:
    servicer = SlowServicer()
    async with (
        serving(GENERATOR, servicer) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        call = generator(channel).GenerateStep(generator_pb2.GenerateStepRequest())
        await anext(aiter(call))
        assert not servicer.has_ended.is_set()
        call.cancel()
        async with asyncio.timeout(20):
            assert await servicer.has_ended.wait()


async def test_a_caller_that_leaves_while_a_message_waits_for_it_is_no_defect(
    caplog: pytest.LogCaptureFixture,
) -> None:
    telemetry, servicer, call_count = Telemetry(), EndlessServicer(), 20

    def count(code: str) -> float | None:
        labels = {"method": "GenerateStep", "code": code}
        return telemetry.registry.get_sample_value("arbitrage_rpc_requests_total", labels)

    async with (
        serving(GENERATOR, servicer, telemetry) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        for _ in range(call_count):
            call = generator(channel).GenerateStep(generator_pb2.GenerateStepRequest())
            await anext(aiter(call))
            sent_count = servicer.sent_count
            await until(lambda before=sent_count: servicer.sent_count > before)  # type: ignore[misc]
            call.cancel()
        await until(lambda: servicer.ended_count == call_count)
        await until(lambda: (count("CANCELLED") or 0) + (count("INTERNAL") or 0) == call_count)
    assert count("INTERNAL") == 0
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_caller_that_reads_nothing_loses_its_call() -> None:
    servicer, telemetry = EndlessServicer(), Telemetry()
    listener = Listener("127.0.0.1", 0, write_timeout_s=0.2)
    server = RpcServer(GENERATOR, listener, telemetry)
    await server.start()
    await server.open(servicer)
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = generator(channel).GenerateStep(generator_pb2.GenerateStepRequest())
        async with asyncio.timeout(20):
            await until(lambda: servicer.ended_count)
            assert await server.gate.wait_until_empty(10.0)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                _ = [message async for message in call]
    assert isinstance(from_rpc_error(raised.value), DeadlineExceeded)
    await server.stop()


async def test_a_deadline_that_passes_ends_the_servicer() -> None:
    servicer = SlowServicer()
    async with (
        serving(GENERATOR, servicer) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        call = generator(channel).GenerateStep(generator_pb2.GenerateStepRequest(), timeout=0.3)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            _ = [message async for message in call]
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        async with asyncio.timeout(20):
            await servicer.has_ended.wait()


@pytest.mark.parametrize("error", [KeyError(SECRET), ExceptionGroup(SECRET, [OSError(SECRET)])])
async def test_a_defect_is_internal_and_keeps_the_problem_to_itself(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        serving(GENERATOR, SlowServicer(error)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as unary:
            await generator(channel).GetGenerator(generator_pb2.GetGeneratorRequest())
        steps = generator(channel).GenerateStep(generator_pb2.GenerateStepRequest())
        with pytest.raises(grpc.aio.AioRpcError) as streaming:
            _ = [message async for message in steps]
    for failed in (unary.value, streaming.value):
        assert isinstance(from_rpc_error(failed), Internal)
        assert SECRET not in (failed.details() or "")
    assert "test_rpc_server.py" in caplog.text
    assert SECRET not in caplog.text


async def test_bytes_that_are_no_message_name_the_field() -> None:
    async with (
        serving(GENERATOR, SlowServicer()) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        send = bytes_stream(channel, f"/{GENERATOR.full_name}/GenerateStep")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await anext(aiter(send(b"\x0a\x01\xff")))
    error = from_rpc_error(raised.value)
    assert isinstance(error, MalformedMessage)
    assert error.field == "problem"


async def test_a_method_that_is_not_there_is_unimplemented() -> None:
    async with (
        serving(GENERATOR, SlowServicer()) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        call = bytes_stream(channel, f"/{GENERATOR.full_name}/GenerateNovel")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await anext(aiter(call(b"")))
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_reflection_lists_the_service() -> None:
    async with (
        serving(GENERATOR, SlowServicer()) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        async for answer in stub.ServerReflectionInfo(iter([ask])):
            names = {found.name for found in answer.list_services_response.service}
    assert {GENERATOR.full_name, "grpc.health.v1.Health"} <= names


async def test_a_taken_port_is_an_error_and_not_shared() -> None:
    async with serving(GENERATOR, SlowServicer()) as server:
        second = RpcServer(GENERATOR, Listener("127.0.0.1", server.port), Telemetry())
        with pytest.raises(PortTaken):
            await second.start()
        await second.stop()


async def test_calls_are_counted_from_zero_by_method_and_code(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)
    telemetry = Telemetry()

    def count(code: str) -> float | None:
        labels = {"method": "GetGenerator", "code": code}
        return telemetry.registry.get_sample_value("arbitrage_rpc_requests_total", labels)

    servicer = SlowServicer()
    async with (
        serving(GENERATOR, servicer, telemetry) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        assert (count("OK"), count("INTERNAL")) == (0.0, 0.0)
        await generator(channel).GetGenerator(generator_pb2.GetGeneratorRequest())
        servicer.error = KeyError()
        with pytest.raises(grpc.aio.AioRpcError):
            await generator(channel).GetGenerator(generator_pb2.GetGeneratorRequest())
    assert (count("OK"), count("INTERNAL")) == (1.0, 1.0)


async def test_metrics_are_read_over_http() -> None:
    endpoint = MetricsEndpoint.start(Telemetry(), "127.0.0.1", 0, lambda: True)
    answer = await http_answer(endpoint.port, "/metrics")
    await asyncio.to_thread(endpoint.close)
    assert b"process_cpu_seconds_total" in answer


async def test_a_prober_without_a_certificate_asks_the_metrics_port() -> None:
    gate = Gate()
    endpoint = MetricsEndpoint.start(Telemetry(), "127.0.0.1", 0, lambda: gate.is_open)
    states = []
    for change in (None, gate.open, gate.close):
        if change is not None:
            change()
        live = await http_answer(endpoint.port, "/live")
        ready = await http_answer(endpoint.port, "/ready")
        states.append((live.split()[1], ready.split()[1]))
    await asyncio.to_thread(endpoint.close)
    assert states == [(b"200", b"503"), (b"200", b"200"), (b"200", b"503")]


class PeerServicer:
    """Knows over which connection each call came."""

    def __init__(self) -> None:
        self.peers: list[str] = []
        self.may_end = asyncio.Event()

    async def GenerateStep(  # noqa: N802 - the proto's name
        self, request: generator_pb2.GenerateStepRequest, context: Context
    ) -> AsyncGenerator[generator_pb2.GenerateStepResponse, None]:
        self.peers.append(context.peer())
        yield generator_pb2.GenerateStepResponse(text_delta="a")
        await self.may_end.wait()
        yield generator_pb2.GenerateStepResponse(text_delta="b")


async def test_a_caller_connects_anew_after_a_while_and_what_runs_goes_on() -> None:
    servicer = PeerServicer()
    listener = Listener("127.0.0.1", 0, connection_age_s=0.1)
    server = RpcServer(GENERATOR, listener, Telemetry())
    await server.start()
    await server.open(servicer)
    async with grpc.aio.insecure_channel(server.address) as channel:
        first = aiter(generator(channel).GenerateStep(generator_pb2.GenerateStepRequest()))
        assert (await anext(first)).text_delta == "a"
        async with asyncio.timeout(30):
            while len(set(servicer.peers)) == 1:
                call = generator(channel).GenerateStep(generator_pb2.GenerateStepRequest())
                await anext(aiter(call))
                call.cancel()
                await asyncio.sleep(0.05)
        servicer.may_end.set()
        assert (await anext(first)).text_delta == "b"
    await server.stop()
