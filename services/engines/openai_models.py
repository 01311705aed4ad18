"""What `/v1/models` says of a model, on vLLM, SGLang, llama.cpp's server and their like."""

from __future__ import annotations

from typing import Any, Final

from arbitrage.core.shown import one_line
from services.engines.engine_http import EngineSetupError, HttpServer
from services.engines.engine_server import ServedModel, digest_of

# What says nothing of the weights, or changes with every answer.
_FLEETING: Final = frozenset({"created", "permission", "permissions"})
_CONTEXT_KEYS: Final = ("max_model_len", "context_length", "n_ctx")


async def served_model(http: HttpServer, model: str) -> ServedModel:
    """Looks for `model` among the server's.

    Raises:
        EngineSetupError: it has no such model.
        ServerError
    """
    entry = _entry(await http.get("/v1/models"), model, http.url)
    kept = {key: value for key, value in entry.items() if key not in _FLEETING}
    meta = entry.get("meta")
    places = (entry, meta if isinstance(meta, dict) else {})
    contexts = (place.get(key) for place in places for key in _CONTEXT_KEYS)
    context = next((n for n in contexts if isinstance(n, int) and n > 0), None)
    # An id alone is a name; what else is said stands for the weights, or for what they are.
    says_more = bool(kept.keys() - {"id", "object", "owned_by"})
    return ServedModel(digest_of(repr(sorted(kept.items()))) if says_more else "", context)


def _entry(answer: Any, model: str, url: str) -> dict[str, Any]:
    entries = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(entries, list):
        raise EngineSetupError(
            "engine_url",
            f"{url}/v1/models holds no list of models",
            "name an OpenAI-compatible server, with what stands before /v1",
        )
    known = {e["id"]: e for e in entries if isinstance(e, dict) and isinstance(e.get("id"), str)}
    if model in known:
        return known[model]
    raise EngineSetupError(
        "model",
        f"{url} serves no model {one_line(model)!r}",
        "set it to one that it does: " + (", ".join(map(one_line, sorted(known))) or "none yet"),
    )
