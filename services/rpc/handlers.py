"""Stands between gRPC and a servicer: parses requests, turns errors into statuses, counts calls.

Handlers take bytes and parse them here, because what gRPC answers when its own parsing fails is
INTERNAL, without a word about the field.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from arbitrage.core.errors import ArbitrageError, DeadlineExceeded, Internal
from arbitrage.status import DETAILS_KEY, code_of, to_status
from services.rpc.auth import Anyone, Authenticator, enter_call
from services.rpc.gate import Gate
from services.rpc.malformed import parse
from services.rpc.refusals import Refusals
from services.rpc.telemetry import RpcMetrics
from services.rpc.tracing import ServedCall

_log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
# What gRPC calls the names in a caller's certificate that a mesh goes by.
_IDENTITIES = ("peer_dns", "peer_uri")


class ServiceHandlers(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in stubs only
    """Serves the methods of one proto service through a servicer that may come later.

    A servicer has one method per rpc, named as in the proto: unary ones are coroutine functions
    of request and context, streaming ones async generator functions.
    """

    def __init__(
        self,
        service: ServiceDescriptor,
        gate: Gate,
        metrics: RpcMetrics,
        refusals: Refusals,
        write_timeout_s: float,
    ) -> None:
        self._gate = gate
        self._metrics = metrics
        self._refusals = refusals
        self._authenticator: Authenticator = Anyone()
        self._write_timeout_s = write_timeout_s
        self._servicer: object | None = None
        self._methods = {
            f"/{service.full_name}/{method.name}": self._handler(method)
            for method in service.methods
        }
        metrics.register(method.name for method in service.methods)

    def install(self, servicer: object, authenticator: Authenticator) -> None:
        """Sets who answers whom; until then, and while the gate is closed, calls are refused."""
        self._servicer = servicer
        self._authenticator = authenticator

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Returns the handler of a method; None where it is not this service's."""
        return self._methods.get(handler_call_details.method)

    def _handler(self, method: MethodDescriptor) -> grpc.RpcMethodHandler[Any, Any]:
        kind = GetMessageClass(method.input_type)
        name = method.name

        async def answer(received: bytes, context: Context) -> Message:
            async with self._call(name, context):
                response = await getattr(self._servicer, name)(parse(kind, received), context)
                assert isinstance(response, Message)
                return response

        async def stream(received: bytes, context: Context) -> None:
            # Written here rather than yielded to gRPC: a generator that gRPC holds is closed by
            # the garbage collector some time after its call was cancelled, not at once.
            async with self._call(name, context):
                responses = getattr(self._servicer, name)(parse(kind, received), context)
                async with aclosing(responses):
                    async for response in responses:
                        await self._write(response, context)

        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(
                stream,
                response_serializer=_serialize,
            )
        return grpc.unary_unary_rpc_method_handler(
            answer,
            response_serializer=_serialize,
        )

    async def _write(self, response: Message, context: Context) -> None:
        patience = asyncio.timeout(self._write_timeout_s)
        try:
            async with patience:
                await context.write(response)
        except grpc.aio.BaseError as error:
            # The caller left while the message waited for it; gRPC says so here before it cancels
            # the call.
            raise asyncio.CancelledError from error
        except TimeoutError:
            if not patience.expired():
                raise
            # The call's place is needed by others; a reader that has stopped must not keep it.
            raise DeadlineExceeded(
                f"the caller took no message for {self._write_timeout_s:g} s; read faster, or "
                "raise ARBITRAGE_WRITE_TIMEOUT_S"
            ) from None

    @asynccontextmanager
    async def _call(self, method: str, context: Context) -> AsyncIterator[None]:
        started_s = time.monotonic()
        code, reason = grpc.StatusCode.CANCELLED, None
        served = ServedCall(method, context.invocation_metadata() or ())
        try:
            async with self._gate.passed():
                metadata = context.invocation_metadata() or ()
                enter_call(
                    await self._authenticator.authenticate(method, metadata, _names_of(context))
                )
                yield
            code = grpc.StatusCode.OK
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - the last line of defence; nothing is lost
            known = known_error(method, error)
            code, reason = code_of(known), known.reason
            self._refusals.count_error(known, context.peer())
            # Without its message, which may quote a prompt.
            _log.info("%s ended with %s", method, reason)
            await _abort(context, known)
        finally:
            self._metrics.count(method, code, time.monotonic() - started_s)
            served.end(code.name, reason)


def _names_of(context: Context) -> frozenset[str]:
    shown = context.auth_context()
    return frozenset(
        name.decode(errors="replace") for kind in _IDENTITIES for name in shown.get(kind, ())
    )


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def known_error(method: str, error: Exception) -> ArbitrageError:
    """Returns what a call that failed ends with: what is no error of ours is a defect."""
    frames = traceback.format_tb(error.__traceback__)
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
        frames += traceback.format_tb(error.__traceback__)
    if isinstance(error, TimeoutError):
        return DeadlineExceeded(f"{method} took longer than it may")
    if isinstance(error, ArbitrageError) and not isinstance(error, Internal):
        return error
    # Only where it happened: an exception's own words may quote a prompt.
    _log.error("%s failed with %s at\n%s", method, type(error).__name__, "".join(frames))
    if isinstance(error, Internal):
        return error
    return Internal(f"{method} failed with a defect; the server's log has the trace")


async def _abort(context: Context, error: ArbitrageError) -> None:
    status = to_status(error)
    await context.abort(
        code_of(error),
        status.message,
        trailing_metadata=((DETAILS_KEY, status.SerializeToString()),),
    )
