"""What programs share whose model a server runs over HTTP: connecting, naming it, a first call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

from arbitrage.core.errors import ArbitrageError
from arbitrage.core.steps import ModelIdentity
from services.engines.base import Engine
from services.engines.engine_http import (
    ConnectionBroken,
    EngineSetupError,
    HttpOptions,
    HttpServer,
    KeyRefused,
    ServerError,
    read_key,
)
from services.engines.engine_server import ServedModel
from services.engines.loading import ModelLoadError
from services.engines.pack_manifest import PackError
from services.rpc.model_program import EngineMetrics
from services.rpc.program import StartError
from services.rpc.remote_settings import RemoteSettings
from services.rpc.settings import variable_of
from services.rpc.telemetry import Telemetry

EngineT = TypeVar("EngineT", bound=Engine)


def http_server(settings: RemoteSettings, silence_timeout_s: float) -> HttpServer:
    """Returns the server that the settings name. Reads files, so a coroutine does it in a thread.

    Raises:
        EngineSetupError: the key or the CA cannot be used.
    """
    assert settings.engine_url is not None, "the settings were checked"
    key_file = settings.engine_api_key_file
    return HttpServer(
        HttpOptions(
            url=settings.engine_url,
            api_key=None if key_file is None else read_key(key_file),
            ca=settings.engine_ca,
            silence_timeout_s=silence_timeout_s,
            max_connections=settings.max_batch + settings.max_queue,
        )
    )


@contextmanager
def setup_failures() -> Iterator[None]:
    """Turns what stops an engine on another server from being made into a `StartError`."""
    try:
        yield
    except EngineSetupError as error:
        raise StartError(f"{variable_of(error.setting)}: {error}") from error
    except (ModelLoadError, PackError) as error:
        raise StartError(f"{variable_of('engine_tokenizer')}: {error}") from error
    except KeyRefused as error:
        raise StartError(f"{variable_of('engine_api_key_file')}: {error}") from error
    except ServerError as error:
        is_absent = isinstance(error, ConnectionBroken)
        fix = "start the server first" if is_absent else "look into the server's log"
        raise StartError(f"{variable_of('engine_url')}: {error}; {fix}, or name another") from error


def named_model(settings: RemoteSettings, served: ServedModel) -> tuple[ModelIdentity, int]:
    """Returns the model's identity and the tokens of its context: what is set, or what it says.

    Raises:
        StartError: neither tells.
    """
    revision = settings.engine_revision or served.revision
    context = settings.engine_max_context_tokens or served.max_context_tokens
    unset = []
    if not revision:
        unset.append(
            f"{variable_of('engine_revision')}: is not set, and the server says nothing that "
            "changes with the model's weights; set it to what stands for them, such as a commit"
        )
    if context is None:
        unset.append(
            f"{variable_of('engine_max_context_tokens')}: is not set, and the server does not say "
            "it; set it to the tokens that a prompt and its answer may have there"
        )
    if not revision or context is None:
        raise StartError("; ".join(unset))
    return ModelIdentity(settings.model_id or settings.model, revision), context


@asynccontextmanager
async def serving(
    engine: EngineT, role: str, url: str | None, telemetry: Telemetry
) -> AsyncIterator[EngineT]:
    """Makes an engine's first call, shows its figures, and closes it at the end.

    Raises:
        StartError: the first call failed.
    """
    try:
        try:
            await engine.warm_up()
        except ArbitrageError as error:
            raise StartError(
                f"{variable_of('engine_url')}: {url}: the first call failed: {error}; start the "
                "server first, check its log, or name another"
            ) from error
        telemetry.registry.register(EngineMetrics(engine, role))
        yield engine
    finally:
        await engine.close()
