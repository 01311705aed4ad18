"""`python -m services.router`: settings, engine, servicer, serve."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from arbitrage.v1 import router_pb2
from services.engines.loading import ModelKind
from services.engines.transformers_scorers import TransformersRouter
from services.router.servicer import RouterServicer
from services.router.settings import RouterSettings
from services.rpc.model_program import running_engine
from services.rpc.program import Program, main
from services.rpc.telemetry import Telemetry


@asynccontextmanager
async def build(settings: RouterSettings, telemetry: Telemetry) -> AsyncIterator[RouterServicer]:
    """Makes the servicer around a loaded, warm model."""
    async with running_engine(
        settings, telemetry, "router", ModelKind.SEQUENCE_CLASSIFICATION, TransformersRouter
    ) as engine:
        yield RouterServicer(engine)


ROUTER = Program(
    component="router",
    service=router_pb2.DESCRIPTOR.services_by_name["RouterService"],
    settings=RouterSettings,
    build=build,
)

if __name__ == "__main__":
    sys.exit(main(ROUTER))
