"""Makes the engine of a generator whose model runs on another server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from arbitrage.core.errors import (
    ArbitrageError,
    DraftUnavailable,
    ModelUnavailable,
    TargetUnavailable,
)
from arbitrage.core.steps import ModelIdentity
from services.engines.engine_http import (
    EngineSetupError,
    HttpOptions,
    HttpServer,
    ServerError,
    read_key,
)
from services.engines.engine_prompts import (
    ChatText,
    PlainText,
    PromptText,
    identity_with,
    load_tokenizer,
)
from services.engines.engine_server import EngineServer
from services.engines.loading import ModelLoadError
from services.engines.openai_server import OpenAiServer
from services.engines.pack_manifest import PackError
from services.engines.remote_generator import RemoteGenerator, RemoteModel
from services.engines.tgi_server import TgiServer
from services.engines.tokenization import PieceTokenizer
from services.generator.settings import GeneratorSettings
from services.rpc.model_program import EngineMetrics, in_daemon_thread, resolved_model
from services.rpc.program import StartError
from services.rpc.settings import variable_of
from services.rpc.telemetry import Telemetry

_UNAVAILABLE: Final[dict[str, type[ModelUnavailable]]] = {
    "draft": DraftUnavailable,
    "target": TargetUnavailable,
}


@dataclass(frozen=True, slots=True)
class _Parts:
    """What takes files to make, and so a thread."""

    server: EngineServer
    prompts: PromptText
    tokenizer: PieceTokenizer | None


@asynccontextmanager
async def running_remote_engine(
    settings: GeneratorSettings, telemetry: Telemetry
) -> AsyncIterator[RemoteGenerator]:
    """Connects to the model's server, makes the first call, and closes the connections at the end.

    Raises:
        StartError: the server, its model or its tokenizer cannot be used as told.
    """
    try:
        parts = await in_daemon_thread(lambda: _parts(settings))
    except EngineSetupError as error:
        raise StartError(f"{variable_of(error.setting)}: {error}") from error
    except (ModelLoadError, PackError) as error:
        raise StartError(f"{variable_of('engine_tokenizer')}: {error}") from error
    try:
        model = await _remote_model(settings, parts)
    except BaseException:
        await parts.server.close()
        raise
    engine = RemoteGenerator(parts.server, model)
    try:
        await _warm_up(engine)
        telemetry.registry.register(EngineMetrics(engine, settings.role))
        yield engine
    finally:
        await engine.close()


async def _warm_up(engine: RemoteGenerator) -> None:
    try:
        await engine.warm_up()
    except ArbitrageError as error:
        raise StartError(
            f"{variable_of('engine_url')}: the first call failed: {error}; check the server's log"
        ) from error


def _parts(settings: GeneratorSettings) -> _Parts:
    assert settings.engine_url is not None, "the settings were checked"
    key_file = settings.engine_api_key_file
    options = HttpOptions(
        url=settings.engine_url,
        api_key=None if key_file is None else read_key(key_file),
        ca=settings.engine_ca,
        silence_timeout_s=settings.engine_silence_timeout_s,
        max_connections=settings.max_batch + settings.max_queue,
    )
    http = HttpServer(options)
    server: EngineServer
    if settings.engine == "tgi":
        server = TgiServer(http, settings.engine_top_logprobs)
    else:
        server = OpenAiServer(http, settings.engine_top_logprobs)
    if settings.engine_tokenizer is None:
        return _Parts(server, PlainText(), None)
    reference = resolved_model(settings.engine_tokenizer, settings.role)
    tokenizer = load_tokenizer(reference, trust_remote_code=settings.trust_remote_code)
    is_chat = settings.engine_prompt == "chat"
    prompts = ChatText(tokenizer, settings.engine_tokenizer) if is_chat else PlainText()
    return _Parts(server, prompts, PieceTokenizer(tokenizer))


async def _remote_model(settings: GeneratorSettings, parts: _Parts) -> RemoteModel:
    try:
        served = await parts.server.describe(settings.model)
    except EngineSetupError as error:
        raise StartError(f"{variable_of(error.setting)}: {error}") from error
    except ServerError as error:
        raise StartError(
            f"{variable_of('engine_url')}: {error}; start the server first, or name another"
        ) from error
    revision = settings.engine_revision or served.revision
    if not revision:
        raise StartError(
            f"{variable_of('engine_revision')}: is not set, and the server says nothing that "
            "changes with the model's weights; set it to what stands for them, such as a commit"
        )
    context = settings.engine_max_context_tokens or served.max_context_tokens
    if context is None:
        raise StartError(
            f"{variable_of('engine_max_context_tokens')}: is not set, and the server does not say "
            "it; set it to the tokens that a prompt and its answer may have there"
        )
    identity = ModelIdentity(settings.model_id or settings.model, revision)
    return RemoteModel(
        identity=identity_with(identity, parts.prompts),
        prompts=parts.prompts,
        tokenizer=parts.tokenizer,
        max_context_tokens=context,
        max_calls=settings.max_batch + settings.max_queue,
        unavailable=_UNAVAILABLE[settings.role],
    )
