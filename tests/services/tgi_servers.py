"""A text-generation-inference without a model, held to its published description both ways.

Every request that comes and every answer that goes is checked against the schemas that the
description has for its route. What breaks them is kept in `violations`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from tests.services.http_servers import HttpReply, HttpRequest

ROOT = Path(__file__).resolve().parents[2]
DESCRIPTION = (
    Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data")) / "tgi-openapi.json"
)
END_TOKEN = "<end>"


def _as_json_schema(node: Any) -> Any:
    """Returns a part of an OpenAPI 3.0 description with `nullable` said as JSON Schema says it."""
    if isinstance(node, list):
        return [_as_json_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    plain = {key: _as_json_schema(value) for key, value in node.items() if key != "nullable"}
    return {"anyOf": [plain, {"type": "null"}]} if node.get("nullable") is True else plain


class Description:
    """The published description of the API."""

    def __init__(self, path: Path = DESCRIPTION) -> None:
        self._schemas = _as_json_schema(json.loads(path.read_text()))["components"]["schemas"]

    def violations(self, schema: str, value: Any) -> list[str]:
        """Returns what of `value` is not as the schema has it; fields it lacks count too."""
        known = set(self._schemas[schema]["properties"])
        found = [f"{schema}: no field {key!r}" for key in sorted(set(value) - known)]
        whole = {"$ref": f"#/components/schemas/{schema}", "components": {"schemas": self._schemas}}
        found += [
            f"{schema}: {error.json_path}: {error.message}"
            for error in Draft202012Validator(whole).iter_errors(value)
        ]
        return found


@dataclass
class FakeTgi:
    """Writes `tokens` after whatever prompt, with the stop sequence left in, as TGI does.

    `refusal` is a status and the two fields of an error's body; with `refuses_in_stream` it comes
    as an event, as it does once TGI streams.
    """

    tokens: list[str]
    description: Description = field(default_factory=Description)
    refusal: tuple[int, str, str] | None = None
    refuses_in_stream: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    async def __call__(self, request: HttpRequest, reply: HttpReply) -> None:
        """Answers one request."""
        if (request.method, request.path) == ("GET", "/info"):
            await reply.answer(200, self._checked("Info", _INFO))
            return
        assert (request.method, request.path) == ("POST", "/generate_stream")
        # The client says `stream` to every route that generates; this one does not look at it.
        body = {key: value for key, value in request.json.items() if key != "stream"}
        self._checked("GenerateRequest", body)
        self._checked("GenerateParameters", body["parameters"])
        self.bodies.append(body)
        if self.refusal is not None and self.is_due(body):
            await self._refuse(*self.refusal, reply)
        else:
            await self._generate(body, reply)

    def is_due(self, body: dict[str, Any]) -> bool:
        """Whether this is the call that is to be refused: not the one at start."""
        return bool(body["parameters"]["max_new_tokens"] > 2)

    async def _refuse(self, status: int, said: str, kind: str, reply: HttpReply) -> None:
        error = self._checked("ErrorResponse", {"error": said, "error_type": kind})
        if not self.refuses_in_stream:
            await reply.answer(status, error, Content_Type="text/event-stream")
            return
        await reply.begin()
        await reply.event(self._event(1, "1", None))
        await reply.event(error)
        await reply.end()

    async def _generate(self, body: dict[str, Any], reply: HttpReply) -> None:
        asked = body["parameters"]
        await reply.begin()
        text = ""
        tokens = self.tokens[: asked["max_new_tokens"]]
        for index, token in enumerate(tokens, start=1):
            text += "" if token == END_TOKEN else token
            reason = None
            if token == END_TOKEN:
                reason = "eos_token"
            elif any(text.endswith(stop) for stop in asked["stop"]):
                reason = "stop_sequence"
            elif index == len(tokens):
                reason = "length"
            event = self._event(index, token, asked.get("top_n_tokens"))
            if reason is not None:
                event["generated_text"] = text
                event["details"] = {
                    "finish_reason": reason,
                    "generated_tokens": index,
                    "input_length": 7,
                    "seed": asked.get("seed"),
                }
            await reply.event(self._checked("StreamResponse", event))
            if reason is not None:
                break
        await reply.end()

    def _event(self, index: int, token: str, top_count: int | None) -> dict[str, Any]:
        half = -0.6931471805599453
        written = {"id": index, "text": token, "logprob": half, "special": token == END_TOKEN}
        event: dict[str, Any] = {"index": index, "token": written}
        if top_count:
            event["top_tokens"] = [written, {**written, "id": 0, "text": "other"}]
        return event

    def _checked(self, schema: str, value: dict[str, Any]) -> dict[str, Any]:
        self.violations += self.description.violations(schema, value)
        return value


_INFO = {
    "model_id": "smol",
    "model_sha": "e985a63cdc139290c5f700ff1929f0b5942cced2",
    "max_concurrent_requests": 128,
    "max_best_of": 2,
    "max_stop_sequences": 4,
    "max_input_tokens": 1024,
    "max_total_tokens": 2048,
    "validation_workers": 2,
    "max_client_batch_size": 4,
    "router": "text-generation-router",
    "version": "3.3.6",
}
