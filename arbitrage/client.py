"""The Python client: an async and a sync transport around one description of a call.

async with AsyncArbitrageClient("localhost:50050") as client:
    async for event in client.stream("1 + 1?", policy=Arbitrage(target_share=0.3)):
        ...
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio

from arbitrage.calls import Addresses, Attempts, RequestOptions, Solution, SolutionCall, solution_of
from arbitrage.channels import (
    ChannelOptions,
    ClientTls,
    Metadata,
    aio_channel,
    call_metadata,
    lasting,
    sync_channel,
)
from arbitrage.core.errors import Cancelled
from arbitrage.core.events import Event
from arbitrage.policy_specs import (
    Arbitrage,
    DraftOnly,
    FirstTokenEntropy,
    Oracle,
    PolicySpec,
    Random,
    Rsd,
    TargetOnly,
)
from arbitrage.request import BudgetSpec, ChatMessage, ChatRole, Problem
from arbitrage.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from arbitrage.wire import Capabilities, RoleModel, capabilities_from_proto

__all__ = [
    "Arbitrage",
    "ArbitrageClient",
    "AsyncArbitrageClient",
    "BudgetSpec",
    "Capabilities",
    "ChatMessage",
    "ChatRole",
    "ClientTls",
    "DraftOnly",
    "FirstTokenEntropy",
    "Oracle",
    "PolicySpec",
    "Problem",
    "Random",
    "RequestOptions",
    "RoleModel",
    "Rsd",
    "Solution",
    "TargetOnly",
]

_CHANNEL_OPTIONS: ChannelOptions = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A name that stands for several orchestrators is asked at all of them, by turns.
    ("grpc.lb_policy_name", "round_robin"),
    # It is looked up again when a connection ends; by default not twice in half a minute.
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),
    *lasting(),
)


@dataclass(slots=True)
class _Connection:
    """What a client has open and has learned, shared by those made of it."""

    channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)
    streams: set[grpc.aio.UnaryStreamCall[Any, Any]] = field(default_factory=set)
    is_resumable: bool = True


class AsyncArbitrageClient:
    """Talks to orchestrators from asyncio. Close it, or use it as a context manager.

    `address` is host:port, or several of them: where one fails, the next is asked. `retries` is how
    often a call that found nobody is made again, and again after every step that came. A stream
    that breaks is resumed where the deployment keeps sessions; elsewhere it fails, for its steps
    would be decoded and paid for twice. Without `tls` the connection is plaintext, and then an
    `api_key` goes to this machine only unless `allow_plaintext_key`.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        retries: int = 5,
        tls: ClientTls | None = None,
        api_key: str | None = None,
        allow_plaintext_key: bool = False,
    ) -> None:
        self._addresses = Addresses(address)
        self._retries = retries
        self._tls = tls
        self._allow_plaintext_key = allow_plaintext_key
        self._metadata = self._metadata_with(api_key)
        self._connection = _Connection()

    def on_behalf_of(self, api_key: str | None, metadata: Metadata = ()) -> Self:
        """Returns a client that calls with another key, and with further metadata.

        It shares this one's connections, and is closed with it.

        Raises:
            FieldInvalid: the key is no text for a header, or anyone on the way could read it.
        """
        other = copy.copy(self)
        other._metadata = (*self._metadata_with(api_key), *metadata)
        return other

    async def stream(
        self, problem: Problem, **options: Unpack[RequestOptions]
    ) -> AsyncGenerator[Event, None]:
        """Yields the events of one solution, `Finished` last. Closing it cancels the request.

        Raises:
            ArbitrageError: the class that stands for the error's reason.
        """
        connection = self._connection
        call = SolutionCall(
            self._addresses, self._retries, problem, options, is_resumable=connection.is_resumable
        )
        while True:
            stub = self._stub(call.attempts.address())
            messages = stub.GenerateSolution(
                call.request, timeout=call.attempts.time_left_s(), metadata=self._metadata
            )
            connection.streams.add(messages)
            try:
                async for message in messages:
                    event = call.received(message)
                    if event is not None:
                        yield event
                call.ended()
                return
            except grpc.RpcError as error:
                delay_s = call.failed(error)
                connection.is_resumable &= call.deployment_keeps_sessions
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                # Nobody cancels the task: so does gRPC end a stream that `close` cancelled.
                raise Cancelled("the client was closed before the stream ended") from None
            finally:
                connection.streams.discard(messages)
                messages.cancel()
            await asyncio.sleep(delay_s)

    async def solve(self, problem: Problem, **options: Unpack[RequestOptions]) -> Solution:
        """Returns the finished solution; raises as `stream` does."""
        return solution_of([event async for event in self.stream(problem, **options)])

    async def capabilities(self, *, timeout_s: float = 10.0) -> Capabilities:
        """Asks the server what it can do."""
        attempts = Attempts(self._addresses, self._retries, timeout_s)
        while True:
            try:
                message = await self._stub(attempts.address()).GetCapabilities(
                    orchestrator_pb2.GetCapabilitiesRequest(),
                    timeout=attempts.time_left_s(),
                    metadata=self._metadata,
                )
                return capabilities_from_proto(message)
            except grpc.RpcError as error:
                delay_s = attempts.failed(error)
            await asyncio.sleep(delay_s)

    async def close(self) -> None:
        """Closes the connection; streams still open end with `Cancelled`."""
        # A channel of grpc.aio finds only some of its calls when it is closed.
        for messages in tuple(self._connection.streams):
            messages.cancel()
        for channel in self._connection.channels.values():
            await channel.close(None)

    def _metadata_with(self, api_key: str | None) -> Metadata:
        metadata: Metadata = ()
        for named in self._addresses.all:
            metadata = call_metadata(
                api_key,
                named,
                is_encrypted=self._tls is not None,
                allow_plaintext=self._allow_plaintext_key,
            )
        return metadata

    def _stub(self, address: str) -> orchestrator_pb2_grpc.OrchestratorServiceAsyncStub:
        channels = self._connection.channels
        if address not in channels:
            channels[address] = aio_channel(address, self._tls, _CHANNEL_OPTIONS)
        stub: orchestrator_pb2_grpc.OrchestratorServiceAsyncStub = (
            orchestrator_pb2_grpc.OrchestratorServiceStub(channels[address])
        )
        return stub

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class ArbitrageClient:
    """Talks to orchestrators from ordinary code; otherwise as `AsyncArbitrageClient`."""

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        retries: int = 5,
        tls: ClientTls | None = None,
        api_key: str | None = None,
        allow_plaintext_key: bool = False,
    ) -> None:
        self._addresses = Addresses(address)
        self._retries = retries
        self._is_resumable = True
        self._tls = tls
        for named in self._addresses.all:
            self._metadata = call_metadata(
                api_key, named, is_encrypted=tls is not None, allow_plaintext=allow_plaintext_key
            )
        self._channels: dict[str, grpc.Channel] = {}

    def stream(
        self, problem: Problem, **options: Unpack[RequestOptions]
    ) -> Generator[Event, None, None]:
        """Yields the events of one solution, `Finished` last. Closing it cancels the request.

        Raises:
            ArbitrageError: the class that stands for the error's reason.
        """
        call = SolutionCall(
            self._addresses, self._retries, problem, options, is_resumable=self._is_resumable
        )
        while True:
            stub = self._stub(call.attempts.address())
            messages = stub.GenerateSolution(
                call.request, timeout=call.attempts.time_left_s(), metadata=self._metadata
            )
            try:
                for message in messages:
                    event = call.received(message)
                    if event is not None:
                        yield event
                call.ended()
                return
            except grpc.RpcError as error:
                delay_s = call.failed(error)
                self._is_resumable &= call.deployment_keeps_sessions
            finally:
                messages.cancel()  # type: ignore[no-untyped-call]  # grpc-stubs say no type
            time.sleep(delay_s)

    def solve(self, problem: Problem, **options: Unpack[RequestOptions]) -> Solution:
        """Returns the finished solution; raises as `stream` does."""
        return solution_of(self.stream(problem, **options))

    def capabilities(self, *, timeout_s: float = 10.0) -> Capabilities:
        """Asks the server what it can do."""
        attempts = Attempts(self._addresses, self._retries, timeout_s)
        while True:
            try:
                message = self._stub(attempts.address()).GetCapabilities(
                    orchestrator_pb2.GetCapabilitiesRequest(),
                    timeout=attempts.time_left_s(),
                    metadata=self._metadata,
                )
                return capabilities_from_proto(message)
            except grpc.RpcError as error:
                delay_s = attempts.failed(error)
            time.sleep(delay_s)

    def close(self) -> None:
        """Closes the connection; streams still open end with `Cancelled`."""
        for channel in self._channels.values():
            channel.close()

    def _stub(self, address: str) -> orchestrator_pb2_grpc.OrchestratorServiceStub:
        if address not in self._channels:
            self._channels[address] = sync_channel(address, self._tls, _CHANNEL_OPTIONS)
        return orchestrator_pb2_grpc.OrchestratorServiceStub(self._channels[address])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
