"""What the programs of a PRM and a router share beside their own model: the extra `kserve`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from services.engines.oip_server import OipServer
from services.rpc.judge_settings import JudgeSettings
from services.rpc.program import StartError
from services.rpc.remote_model import EngineT, serving
from services.rpc.settings import variable_of
from services.rpc.telemetry import Telemetry


@contextmanager
def kserve_needed(field: str) -> Iterator[None]:
    """Says which setting needs the extra, where an import inside the block fails.

    Raises:
        StartError
    """
    try:
        yield
    except ImportError as error:
        raise StartError(
            f"{variable_of(field)}: needs kserve, which is not installed ({error}); install "
            "'arbitrage[kserve]'"
        ) from error


@asynccontextmanager
async def running_remote_judge(
    settings: JudgeSettings,
    telemetry: Telemetry,
    role: str,
    prepare: Callable[[], Callable[[OipServer], EngineT]],
) -> AsyncIterator[EngineT]:
    """Connects to the server that judges, makes the first call, and closes the connection.

    `prepare` may read files, and returns what makes the engine.

    Raises:
        StartError: the server does not answer as it should, or a file cannot be read.
    """
    server = await asyncio.to_thread(_server, settings)
    build = await asyncio.to_thread(prepare)
    async with serving(build(server), role, settings.engine_url, telemetry) as engine:
        yield engine


def _server(settings: JudgeSettings) -> OipServer:
    assert settings.engine_url is not None, "the settings were checked"
    try:
        ca = None if settings.engine_ca is None else settings.engine_ca.read_bytes()
    except OSError as error:
        raise StartError(
            f"{variable_of('engine_ca')}: {settings.engine_ca}: cannot be read "
            f"({error.strerror}); name a PEM file"
        ) from error
    return OipServer(settings.engine_url, settings.model, settings.engine_timeout_s, ca)
