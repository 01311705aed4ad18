"""Real servers on free ports, for tests: one around any servicer, and a whole deployment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor

from arbitrage.core.errors import ArbitrageError
from arbitrage.core.steps import ModelIdentity
from arbitrage.status import from_rpc_error
from arbitrage.v1 import generator_pb2, orchestrator_pb2, orchestrator_pb2_grpc, prm_pb2, router_pb2
from services.generator.servicer import GeneratorServicer
from services.orchestrator.__main__ import authenticator, build
from services.orchestrator.settings import OrchestratorSettings
from services.prm.servicer import PrmServicer
from services.router.servicer import RouterServicer
from services.rpc.auth import Authenticator
from services.rpc.server import Listener, RpcServer
from services.rpc.telemetry import Telemetry
from services.rpc.tls import TlsFiles
from tests.services.fakes_engines import (
    FakeGeneratorEngine,
    FakePrmEngine,
    FakeRouterEngine,
    numbered,
)

GENERATOR = generator_pb2.DESCRIPTOR.services_by_name["GeneratorService"]
PRM = prm_pb2.DESCRIPTOR.services_by_name["PrmService"]
ROUTER = router_pb2.DESCRIPTOR.services_by_name["RouterService"]
ORCHESTRATOR = orchestrator_pb2.DESCRIPTOR.services_by_name["OrchestratorService"]
Solution = list[orchestrator_pb2.GenerateSolutionResponse]


@asynccontextmanager
async def serving(
    service: ServiceDescriptor,
    servicer: object,
    telemetry: Telemetry | None = None,
    tls: TlsFiles | None = None,
    authenticator: Authenticator | None = None,
) -> AsyncIterator[RpcServer]:
    """Serves on a free port until the block is left."""
    server = RpcServer(service, Listener("127.0.0.1", 0, tls=tls), telemetry or Telemetry())
    await server.start()
    try:
        await server.open(servicer, authenticator)
        yield server
    finally:
        await server.stop()


@dataclass
class House:
    """A whole deployment in this process, with engines that a test may change.

    `tls` is the orchestrator's, `models_tls` that of each model service.
    """

    draft: FakeGeneratorEngine = field(
        default_factory=lambda: FakeGeneratorEngine(write=numbered("draft", 3))
    )
    target: FakeGeneratorEngine = field(
        default_factory=lambda: FakeGeneratorEngine(write=numbered("target", 3))
    )
    prm: FakePrmEngine = field(
        default_factory=lambda: FakePrmEngine(identity=ModelIdentity("prm", "r1"))
    )
    router: FakeRouterEngine = field(
        default_factory=lambda: FakeRouterEngine(identity=ModelIdentity("router", "r1"))
    )
    settings: dict[str, Any] = field(default_factory=dict)
    telemetry: Telemetry = field(default_factory=Telemetry)
    servers: dict[str, RpcServer] = field(default_factory=dict)
    address: str = ""
    tls: TlsFiles | None = None
    models_tls: TlsFiles | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[orchestrator_pb2_grpc.OrchestratorServiceAsyncStub]:
        """Starts everything and hands over a stub of the orchestrator."""
        servicers = {
            "draft": (GENERATOR, GeneratorServicer(self.draft, 256)),
            "target": (GENERATOR, GeneratorServicer(self.target, 256)),
            "prm": (PRM, PrmServicer(self.prm)),
            "router": (ROUTER, RouterServicer(self.router)),
        }
        async with AsyncExitStack() as stack:
            for role, (service, servicer) in servicers.items():
                server = await stack.enter_async_context(
                    serving(service, servicer, tls=self.models_tls)
                )
                self.servers[role] = server
            addresses = {f"{role}_address": self.servers[role].address for role in servicers}
            # A test's Redis is away when the test says so, not when the machine is busy.
            patient = {"store_timeout_s": 5.0}
            settings = OrchestratorSettings(**{**addresses, **patient, **self.settings})
            orchestrator = await stack.enter_async_context(build(settings, self.telemetry))
            door = await asyncio.to_thread(authenticator, settings, self.telemetry)
            server = await stack.enter_async_context(
                serving(ORCHESTRATOR, orchestrator, self.telemetry, self.tls, door)
            )
            self.servers["orchestrator"] = server
            self.address = server.address
            channel = grpc.aio.insecure_channel(
                server.address, options=(("grpc.max_send_message_length", -1),)
            )
            await stack.enter_async_context(channel)
            yield orchestrator_pb2_grpc.OrchestratorServiceStub(channel)

    def metric(self, name: str, **labels: str) -> float | None:
        """Returns a metric of the orchestrator."""
        return self.telemetry.registry.get_sample_value(name, labels)


async def http_answer(port: int, path: str) -> bytes:
    """Returns what the metrics port answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def until(condition: Callable[[], object]) -> None:
    """Waits for something to become true that no event tells of."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - as the sentence above says
            await asyncio.sleep(0.005)


def bytes_stream(channel: grpc.aio.Channel, method: str) -> Any:
    """Returns a call of `method` that sends and receives bytes as they are."""
    untyped: Any = channel
    return untyped.unary_stream(method)


def asking(**fields: Any) -> orchestrator_pb2.GenerateSolutionRequest:
    """Returns a request for a solution by the draft alone, unless `fields` say otherwise."""
    request = orchestrator_pb2.GenerateSolutionRequest(**{"problem": "1 + 1?", **fields})
    if request.WhichOneof("policy") is None:
        request.draft_only.SetInParent()
    return request


async def solution(
    stub: orchestrator_pb2_grpc.OrchestratorServiceAsyncStub,
    request: orchestrator_pb2.GenerateSolutionRequest,
) -> Solution:
    """Returns all events of a solution.

    Raises:
        ArbitrageError: the class that stands for the status.
    """
    try:
        return [event async for event in stub.GenerateSolution(request, timeout=20)]
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


async def refusal(
    stub: orchestrator_pb2_grpc.OrchestratorServiceAsyncStub,
    request: orchestrator_pb2.GenerateSolutionRequest,
) -> ArbitrageError:
    """Returns the error a request ends with."""
    try:
        await solution(stub, request)
    except ArbitrageError as error:
        return error
    raise AssertionError("the request was served")


def committed(events: Solution) -> list[orchestrator_pb2.StepCommitted]:
    """Returns the steps of a solution."""
    return [event.step_committed for event in events if event.HasField("step_committed")]
