"""Serves a judge by the Open Inference Protocol, REST and gRPC, as KServe's predictors do.

KServe's own `ModelServer` wants the whole process: its loop, signals, logging and metrics. Here
its data plane and endpoints stand beside our gRPC server in one program, over the same engine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
from fastapi import FastAPI
from kserve import InferRequest, InferResponse, Model, ModelRepository
from kserve import errors as kserve_errors
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from kserve.protocol.rest.v2_endpoints import register_v2_endpoints

from arbitrage.core.errors import ArbitrageError, InvalidRequest
from services.engines.oip_rows import (
    Judgement,
    input_types,
    output_types,
    response_of,
    rows_of,
)
from services.rpc.http import listening_socket, served_over_http
from services.rpc.judge_settings import JudgeSettings
from services.rpc.program import StartError
from services.rpc.settings import variable_of

# Judges one row: its texts in the order of the predictor's inputs, and its number.
Judge = Callable[[Sequence[str], int], Awaitable[Judgement]]
_HANDLERS: dict[type[Exception], Any] = {
    kserve_errors.InvalidInput: kserve_errors.invalid_input_handler,
    kserve_errors.ModelNotFound: kserve_errors.model_not_found_handler,
    kserve_errors.ModelNotReady: kserve_errors.model_not_ready_handler,
    NotImplementedError: kserve_errors.not_implemented_error_handler,
}


class NotNow(kserve_errors.ModelNotReady):  # type: ignore[misc]  # untyped there
    """There is no answer at present."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        # KServe's gRPC side reads this, and its own class has it not.
        self.reason = reason


class Predictor(Model):  # type: ignore[misc]  # untyped there
    """A judge as a model of KServe's. The rows of a request run together."""

    def __init__(self, name: str, inputs: Sequence[str], judge: Judge, max_rows: int) -> None:
        super().__init__(name)
        self._inputs = inputs
        self._judge = judge
        self._max_rows = max_rows
        self.ready = True

    def get_input_types(self) -> list[dict[str, object]]:
        """Returns the metadata of a request's tensors."""
        return input_types(self._inputs)

    def get_output_types(self) -> list[dict[str, object]]:
        """Returns the metadata of an answer's tensors."""
        return output_types()

    async def predict(self, payload: InferRequest, headers: object = None) -> InferResponse:
        """Returns a judgement for each row.

        Raises:
            InvalidInput: REST 400, INVALID_ARGUMENT
            ModelNotReady: there is no room now, or the program is stopping; REST 503, UNAVAILABLE
        """
        rows = rows_of(payload, self._inputs, self._max_rows)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._judged(row, number)) for number, row in enumerate(rows)
                ]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return response_of(payload, self.name, [task.result() for task in tasks])

    async def _judged(self, row: Sequence[str], number: int) -> Judgement:
        try:
            return await self._judge(row, number)
        except InvalidRequest as error:
            raise kserve_errors.InvalidInput(f"row {number}: {error}") from error
        except ArbitrageError as error:
            raise NotNow(self.name, f"{error} [{error.reason}]") from error


@asynccontextmanager
async def served_by_kserve(
    settings: JudgeSettings, role: str, inputs: Sequence[str], judge: Judge
) -> AsyncIterator[None]:
    """Serves `judge` on the ports that the settings name, until the block is left.

    Raises:
        StartError: a port is taken.
    """
    predictor = Predictor(settings.kserve_model or role, inputs, judge, settings.kserve_max_rows)
    repository = ModelRepository()
    repository.update(predictor)
    # It looks up its own version on the disk.
    plane = await asyncio.to_thread(DataPlane, repository)
    extension = ModelRepositoryExtension(repository)
    async with contextlib.AsyncExitStack() as stack:
        if settings.kserve_http_port is not None:
            rest = _rest(plane, extension, settings.host, settings.kserve_http_port)
            await stack.enter_async_context(rest)
        if settings.kserve_grpc_port is not None:
            rpc = _grpc(plane, extension, settings, settings.kserve_grpc_port)
            await stack.enter_async_context(rpc)
        yield
        predictor.ready = False


@asynccontextmanager
async def _rest(
    plane: DataPlane, extension: ModelRepositoryExtension, host: str, port: int
) -> AsyncIterator[None]:
    app = FastAPI(title="Arbitrage", docs_url=None, redoc_url=None, openapi_url=None)
    register_v2_endpoints(app, plane, extension)
    for error, handler in _HANDLERS.items():
        app.add_exception_handler(error, handler)
    try:
        listening = listening_socket(host, port)
    except OSError:
        raise _port_taken("kserve_http_port", host, port) from None
    async with served_over_http(app, listening):
        yield


@asynccontextmanager
async def _grpc(
    plane: DataPlane, extension: ModelRepositoryExtension, settings: JudgeSettings, port: int
) -> AsyncIterator[None]:
    most = settings.max_message_mib << 20
    options = [
        ("grpc.max_send_message_length", most),
        ("grpc.max_receive_message_length", most),
        # Otherwise two programs would share a port, and nobody would know which is asked.
        ("grpc.so_reuseport", 0),
    ]
    server = grpc.aio.server(interceptors=(ExceptionToStatusInterceptor(),), options=options)
    servicer = InferenceServicer(plane, extension)
    grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    try:
        server.add_insecure_port(f"{settings.host}:{port}")
    except RuntimeError:
        raise _port_taken("kserve_grpc_port", settings.host, port) from None
    await server.start()
    try:
        yield
    finally:
        await server.stop(settings.shutdown_grace_s)


def _port_taken(field: str, host: str, port: int) -> StartError:
    return StartError(
        f"{variable_of(field)}: cannot listen on {host}:{port}, most likely because another "
        f"program does; stop it, or set {variable_of(field)} to a free port"
    )
