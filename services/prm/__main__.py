"""`python -m services.prm`: settings, engine, servicer, serve."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from arbitrage.v1 import prm_pb2
from services.engines.loading import ModelKind
from services.engines.prm_families import find_family
from services.engines.transformers_scorers import TransformersPrm
from services.prm.servicer import PrmServicer
from services.prm.settings import PrmSettings
from services.rpc.model_program import running_engine
from services.rpc.program import Program, main
from services.rpc.telemetry import Telemetry


@asynccontextmanager
async def build(settings: PrmSettings, telemetry: Telemetry) -> AsyncIterator[PrmServicer]:
    """Makes the servicer around a loaded, warm model."""
    named = settings.prm_family

    def kind(folder: Path) -> ModelKind:
        return find_family(folder, settings.model, named).kind

    build_engine = partial(TransformersPrm, family=named)
    async with running_engine(settings, telemetry, "prm", kind, build_engine) as engine:
        yield PrmServicer(engine)


PRM = Program(
    component="prm",
    service=prm_pb2.DESCRIPTOR.services_by_name["PrmService"],
    settings=PrmSettings,
    build=build,
)

if __name__ == "__main__":
    sys.exit(main(PRM))
