"""`python -m services.generator`: settings, engine, servicer, serve."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

from arbitrage.v1 import generator_pb2
from services.engines.base import GeneratorEngine
from services.engines.loading import ModelKind
from services.engines.transformers_generator import TransformersGenerator
from services.generator.remote import running_remote_engine
from services.generator.servicer import GeneratorServicer
from services.generator.settings import GeneratorSettings
from services.rpc.model_program import running_engine
from services.rpc.program import Program, main
from services.rpc.server import rpc_server
from services.rpc.telemetry import Telemetry


@asynccontextmanager
async def build(
    settings: GeneratorSettings, telemetry: Telemetry
) -> AsyncIterator[GeneratorServicer]:
    """Makes the servicer around a warm model, here or on another server."""
    async with _engine(settings, telemetry) as engine:
        yield GeneratorServicer(engine, settings.default_max_step_tokens)


def _engine(
    settings: GeneratorSettings, telemetry: Telemetry
) -> AbstractAsyncContextManager[GeneratorEngine]:
    if settings.engine != "transformers":
        return running_remote_engine(settings, telemetry)
    is_chat = settings.engine_prompt == "chat"
    return running_engine(
        settings,
        telemetry,
        settings.role,
        ModelKind.CAUSAL_LM,
        partial(TransformersGenerator, is_chat=is_chat),
    )


GENERATOR = Program(
    component="generator",
    server=rpc_server(generator_pb2.DESCRIPTOR.services_by_name["GeneratorService"]),
    settings=GeneratorSettings,
    build=build,
)

if __name__ == "__main__":
    sys.exit(main(GENERATOR))
