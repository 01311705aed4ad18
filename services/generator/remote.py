"""Makes the engine of a generator whose model runs on another server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from arbitrage.core.errors import DraftUnavailable, ModelUnavailable, TargetUnavailable
from services.engines.engine_prompts import (
    ChatText,
    PlainText,
    PromptText,
    identity_with,
    load_tokenizer,
)
from services.engines.engine_server import EngineServer
from services.engines.openai_server import OpenAiServer
from services.engines.remote_generator import RemoteGenerator, RemoteModel
from services.engines.tgi_server import TgiServer
from services.engines.tokenization import PieceTokenizer
from services.generator.settings import GeneratorSettings
from services.rpc.model_program import in_daemon_thread, resolved_model
from services.rpc.remote_model import http_server, named_model, serving, setup_failures
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
    with setup_failures():
        parts = await in_daemon_thread(lambda: _parts(settings))
    try:
        with setup_failures():
            model = await _remote_model(settings, parts)
    except BaseException:
        await parts.server.close()
        raise
    engine = RemoteGenerator(parts.server, model)
    async with serving(engine, settings.role, settings.engine_url, telemetry) as served:
        yield served


def _parts(settings: GeneratorSettings) -> _Parts:
    http = http_server(settings, settings.engine_silence_timeout_s)
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
    served = await parts.server.describe(settings.model)
    identity, context = named_model(settings, served)
    return RemoteModel(
        identity=identity_with(identity, parts.prompts),
        prompts=parts.prompts,
        tokenizer=parts.tokenizer,
        max_context_tokens=context,
        max_calls=settings.max_batch + settings.max_queue,
        unavailable=_UNAVAILABLE[settings.role],
    )
