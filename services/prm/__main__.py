"""`python -m services.prm`: settings, engine, servicer, serve."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path

from arbitrage.v1 import prm_pb2
from services.engines.base import PrmEngine
from services.engines.loading import ModelKind
from services.engines.prm_families import find_family
from services.engines.transformers_scorers import TransformersPrm
from services.prm.remote import running_vllm_prm
from services.prm.servicer import PrmServicer
from services.prm.settings import PrmSettings
from services.rpc.judge_program import kserve_needed, running_remote_judge
from services.rpc.model_program import running_engine
from services.rpc.program import Program, main
from services.rpc.server import rpc_server
from services.rpc.telemetry import Telemetry


@asynccontextmanager
async def build(settings: PrmSettings, telemetry: Telemetry) -> AsyncIterator[PrmServicer]:
    """Makes the servicer around a loaded, warm model, here or on another server."""
    async with _engine(settings, telemetry) as engine, _predictor(settings, engine):
        yield PrmServicer(engine)


def _engine(settings: PrmSettings, telemetry: Telemetry) -> AbstractAsyncContextManager[PrmEngine]:
    if settings.engine == "vllm":
        return running_vllm_prm(settings, telemetry)
    if settings.engine == "oip":
        with kserve_needed("engine"):
            from services.engines.oip_judges import OipPrm
        return running_remote_judge(settings, telemetry, "prm", lambda: OipPrm)
    named = settings.prm_family

    def kind(folder: Path) -> ModelKind:
        return find_family(folder, settings.model, named).kind

    build_engine = partial(TransformersPrm, family=named)
    return running_engine(settings, telemetry, "prm", kind, build_engine)


def _predictor(settings: PrmSettings, engine: PrmEngine) -> AbstractAsyncContextManager[None]:
    if not settings.is_predictor:
        return nullcontext()
    with kserve_needed("kserve_http_port"):
        from services.prm.predictor import predictor
    return predictor(settings, engine)


PRM = Program(
    component="prm",
    server=rpc_server(prm_pb2.DESCRIPTOR.services_by_name["PrmService"]),
    settings=PrmSettings,
    build=build,
)

if __name__ == "__main__":
    sys.exit(main(PRM))
