"""Makes the engine of a PRM whose model vLLM runs."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from services.engines.engine_http import EngineSetupError, HttpServer
from services.engines.engine_prompts import load_tokenizer
from services.engines.openai_models import served_model
from services.engines.prm_families import PrmFamily, find_family
from services.engines.prm_readings import PrmReading, PrmTokenizer
from services.engines.tokenization import PieceTokenizer
from services.engines.vllm_prm import SERVED_FAMILIES, VllmModel, VllmPrm
from services.prm.settings import PrmSettings
from services.rpc.model_program import in_daemon_thread, resolved_model
from services.rpc.remote_model import http_server, named_model, serving, setup_failures
from services.rpc.telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class _Parts:
    """What takes files to make, and so a thread."""

    http: HttpServer
    family: str
    reading: PrmReading
    tokenizer: PieceTokenizer


@asynccontextmanager
async def running_vllm_prm(settings: PrmSettings, telemetry: Telemetry) -> AsyncIterator[VllmPrm]:
    """Connects to the model's server, checks its head, and closes the connections at the end.

    Raises:
        StartError: the server, its model or its tokenizer cannot be used as told.
    """
    with setup_failures():
        parts = await in_daemon_thread(lambda: _parts(settings))
    try:
        with setup_failures():
            engine = await _checked_engine(settings, parts)
    except BaseException:
        await parts.http.close()
        raise
    async with serving(engine, "prm", settings.engine_url, telemetry) as served:
        yield served


def _parts(settings: PrmSettings) -> _Parts:
    assert settings.engine_tokenizer is not None, "the settings were checked"
    reference = resolved_model(settings.engine_tokenizer, "prm")
    family = _family(settings, reference)
    loaded = load_tokenizer(reference, trust_remote_code=settings.trust_remote_code)
    pieces = PieceTokenizer(loaded)
    folder = Path(os.path.expanduser(reference))
    known = PrmTokenizer(reference, pieces, loaded, folder if folder.is_dir() else None)
    reading = family.read(known)
    return _Parts(http_server(settings, settings.engine_timeout_s), family.name, reading, pieces)


def _family(settings: PrmSettings, reference: str) -> PrmFamily:
    folder = Path(os.path.expanduser(reference))
    fix = f"set it to one that vLLM runs: {', '.join(SERVED_FAMILIES)}"
    if settings.prm_family is None and not (folder / "config.json").is_file():
        raise EngineSetupError(
            "prm_family",
            f"is not set, and {settings.engine_tokenizer} has no config.json that tells it",
            fix,
        )
    family = find_family(folder, reference, settings.prm_family)
    if family.name not in SERVED_FAMILIES:
        raise EngineSetupError(
            "prm_family",
            f"vLLM has no head for {family.name}",
            f"{fix}; or run this one with ARBITRAGE_ENGINE=transformers",
        )
    return family


async def _checked_engine(settings: PrmSettings, parts: _Parts) -> VllmPrm:
    served = await served_model(parts.http, settings.model)
    identity, context = named_model(settings, served)
    model = VllmModel(
        name=settings.model,
        identity=identity,
        family=parts.family,
        reading=parts.reading,
        tokenizer=parts.tokenizer,
        max_context_tokens=context,
        max_calls=settings.max_batch + settings.max_queue,
    )
    engine = VllmPrm(parts.http, model)
    await engine.check_head()
    return engine
