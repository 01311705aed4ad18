"""A server of `/v1/completions` without a model: it writes what it is told, in one of the dialects.

Tokens are texts. Like the real ones it stops at stop strings, holds back what may be the start of
one, and says why it ended in fields of its own.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.services.http_servers import HttpReply, HttpRequest

END_TOKEN = "<end>"
Dialect = Literal["vllm", "sglang", "llama", "llama-server"]
_END_ID = 2


@dataclass
class FakeOpenAi:
    """Writes `tokens` after whatever prompt, END_TOKEN among them, or what `by_prompt` has for it.

    `llama` (llama-cpp-python) names no stop, tells no usage, and takes no token ids; `llama-server`
    (llama.cpp's own) names no stop, and tells log-probabilities as chat completions do.
    """

    tokens: list[str]
    dialect: Dialect = "vllm"
    by_prompt: dict[str, list[str]] = field(default_factory=dict)
    model_entry: dict[str, Any] = field(
        default_factory=lambda: {"id": "smol", "created": 1, "root": "/models/smol@1"}
    )
    has_logprobs: bool = True
    # The first completions that end in the middle, after so many tokens.
    broken_after: list[int] = field(default_factory=list)
    # Where set, a completion says nothing after its first token until it is.
    may_go_on: asyncio.Event | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)

    async def __call__(self, request: HttpRequest, reply: HttpReply) -> None:
        """Answers one request."""
        if request.path.endswith("/v1/models"):
            await reply.answer(200, {"object": "list", "data": [self.model_entry]})
            return
        assert request.path.endswith("/v1/completions")
        body = request.json
        if self.dialect == "llama" and not isinstance(body["prompt"], str):
            await reply.answer(422, {"detail": "prompt: Input should be a valid string"})
        elif not self.has_logprobs and "logprobs" in body:
            await reply.answer(500, {"error": {"message": "logprobs need logits_all"}})
        else:
            self.bodies.append(body)
            await self._complete(body, reply)

    async def _complete(self, body: dict[str, Any], reply: HttpReply) -> None:
        is_trial = body["max_tokens"] == 2
        tokens = self.by_prompt.get(str(body["prompt"]), self.tokens)
        await reply.begin()
        text, sent, count = "", "", 0
        ended: tuple[str, object] = ("length", None)
        stops = body.get("stop", [])
        for token in tokens[: body["max_tokens"]]:
            if not is_trial and self.broken_after and count == self.broken_after[0]:
                del self.broken_after[0]
                await reply.break_off()
                return
            count += 1
            if token == END_TOKEN:
                ended = ("stop", _END_ID if self.dialect == "sglang" else None)
                break
            text += token
            found = next((stop for stop in stops if stop in text), None)
            if found is not None:
                text = text[: text.index(found)]
                ended = ("stop", found)
                break
            ready = text if not stops else text.rstrip("\n")
            await reply.event(self._chunk(ready[len(sent) :], token, body))
            sent = ready
            if self.may_go_on is not None and not is_trial:
                await self.may_go_on.wait()
        last = self._chunk(text[len(sent) :], "", {}, finish_reason=ended[0])
        last["choices"][0].update(self._stop_field(ended[1]))
        await reply.event(last)
        if self.dialect != "llama":
            usage = {"prompt_tokens": 7, "completion_tokens": count}
            await reply.event({"choices": [], "usage": usage})
        await reply.event("[DONE]")
        await reply.end()

    def _chunk(
        self, text: str, token: str, body: dict[str, Any], finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": finish_reason}
        choice.update(self._stop_field(None))
        if "logprobs" in body:
            choice["logprobs"] = self._logprobs(token)
        return {"object": "text_completion", "model": "smol", "choices": [choice]}

    def _logprobs(self, token: str) -> dict[str, Any]:
        half = -0.6931471805599453
        if self.dialect == "llama-server":
            likely = [{"id": 1, "token": text, "logprob": half} for text in (token, "other")]
            return {"content": [{"id": 1, "token": token, "logprob": half, "top_logprobs": likely}]}
        return {
            "tokens": [token],
            "token_logprobs": [half],
            "top_logprobs": [{token: half, "other": half}],
        }

    def _stop_field(self, value: object) -> dict[str, object]:
        match self.dialect:
            case "vllm":
                return {"stop_reason": value}
            case "sglang":
                return {"matched_stop": value}
            case "llama" | "llama-server":
                return {}
