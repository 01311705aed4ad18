"""OpenAI's chat completions as calls of ours, and solutions as their answers. Pure.

What would change the answer and cannot be honoured is refused; what changes nothing is passed over.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from arbitrage.calls import JoinedSteps, RequestOptions, Solution
from arbitrage.core.errors import FieldInvalid, MalformedMessage
from arbitrage.core.events import Event, Finished, StepCommitted
from arbitrage.core.ledger import Ledger
from arbitrage.core.steps import GREEDY, Sampling, StopReason
from arbitrage.policy_specs import POLICY_NAMES, PolicyOptions, policy_named
from arbitrage.request import BudgetSpec, ChatMessage, ChatRole
from services.gateway.errors import HttpError

_DOCS: Final = "docs/openai.md says what is taken"
_ROLES: Final = MappingProxyType(
    {
        "system": ChatRole.SYSTEM,
        "developer": ChatRole.SYSTEM,
        "user": ChatRole.USER,
        "assistant": ChatRole.ASSISTANT,
    }
)
# Fields that ask for what is not offered here, and the values by which they do not.
_NOT_OFFERED: Final[Mapping[str, tuple[object, ...]]] = MappingProxyType(
    {
        "n": (1,),
        "stop": ([],),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "logit_bias": ({},),
        "logprobs": (False,),
        "top_logprobs": (0,),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "reasoning_effort": (),
        "verbosity": (),
        "prediction": (),
        "web_search_options": (),
    }
)
# Fields that change nothing of the answer.
_PASSED_OVER: Final = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Text(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)
    type: str
    text: str | None = None


class _Message(BaseModel):
    # Clients send back what they got, with fields that are empty.
    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    role: str
    content: str | list[_Text] | None = None
    name: str | None = None


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)
    include_usage: bool = False


class _Extension(_Strict):
    """What a request may say beyond OpenAI's fields, as `arbitrage`."""

    threshold: float | None = None
    target_share: float | None = None
    max_threshold: float | None = None
    seed: int | None = None
    token_count: int | None = None
    max_steps: int | None = None
    max_step_tokens: int | None = None
    max_target_steps: int | None = None
    time_limit_s: float | None = None
    allow_degraded: bool = False
    request_id: str | None = None


class _Body(_Strict):
    model: str
    messages: list[_Message]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    arbitrage: _Extension = Field(default_factory=_Extension)


@dataclass(frozen=True, slots=True)
class ChatCall:
    """One chat completion as it was asked for."""

    policy: str
    messages: tuple[ChatMessage, ...]
    options: RequestOptions
    is_stream: bool
    includes_usage: bool


def chat_call(body: bytes) -> ChatCall:
    """Returns the call that a request's body asks for.

    Raises:
        InvalidRequest: a field is unknown, of the wrong type, or asks for what is not offered.
        HttpError: there is no such model.
    """
    asked = _asked(_object(body))
    if asked.model not in POLICY_NAMES:
        raise no_such_model(asked.model, POLICY_NAMES)
    extension = asked.arbitrage
    policy = policy_named(
        asked.model,
        PolicyOptions(
            extension.threshold,
            extension.target_share,
            extension.seed,
            extension.token_count,
            extension.max_threshold,
        ),
    )
    options = RequestOptions(
        policy=policy,
        budgets=BudgetSpec(
            extension.max_steps,
            _first(asked.max_completion_tokens, asked.max_tokens),
            extension.max_step_tokens,
            extension.max_target_steps,
            extension.time_limit_s,
        ),
        sampling=Sampling(
            _first(asked.temperature, GREEDY.temperature),
            _first(asked.top_p, GREEDY.top_p),
            _first(asked.top_k, GREEDY.top_k),
            asked.seed,
        ),
        allow_degraded=extension.allow_degraded,
    )
    if extension.request_id is not None:
        options["request_id"] = extension.request_id
    return ChatCall(
        asked.model,
        tuple(_message(index, message) for index, message in enumerate(asked.messages)),
        options,
        bool(asked.stream),
        asked.stream_options is not None and asked.stream_options.include_usage,
    )


def no_such_model(model: str, offered: tuple[str, ...]) -> HttpError:
    """Returns the error of a model that is not offered: a policy's name is one."""
    return HttpError(
        404,
        "model_not_found",
        f"model: there is no {json.dumps(model)[:100]}; give one of {', '.join(offered)}",
        "model",
    )


@dataclass(slots=True)
class Answer:
    """An answer as it comes: what each event of a solution adds to it."""

    policy: str
    includes_usage: bool = False
    completion_id: str = field(default_factory=lambda: f"chatcmpl-{uuid4().hex}")
    created_s: int = field(default_factory=lambda: int(time.time()))
    _joined: JoinedSteps = field(default_factory=JoinedSteps)
    _has_begun: bool = False

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        """Yields the chunks of a stream that an event makes."""
        match event:
            case StepCommitted():
                delta = {"content": self._joined.add(event)}
                if not self._has_begun:
                    delta = {"role": "assistant", **delta}
                self._has_begun = True
                yield self._chunk(delta, None, _told(event))
            case Finished():
                cost = _cost(event.stop_reason, event.ledger)
                yield self._chunk({}, _finish_reason(event.stop_reason), cost)
                if self.includes_usage:
                    yield {**self._head("chat.completion.chunk"), "choices": []} | {
                        "usage": _usage(event.ledger)
                    }

    def whole(self, solution: Solution) -> dict[str, Any]:
        """Returns the answer to a request that is not streamed."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": solution.text, "refusal": None},
            "logprobs": None,
            "finish_reason": _finish_reason(solution.stop_reason),
        }
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": _usage(solution.ledger),
            "arbitrage": {
                **_cost(solution.stop_reason, solution.ledger),
                "steps": [_told(step) for step in solution.steps],
            },
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.completion_id,
            "object": kind,
            "created": self.created_s,
            "model": self.policy,
        }

    def _chunk(
        self, delta: Mapping[str, str], finish_reason: str | None, told: Mapping[str, Any]
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice], "arbitrage": told}
        # Whoever asked for usage finds the field in every chunk.
        return {**chunk, "usage": None} if self.includes_usage else chunk


def model_list(policies: tuple[str, ...], created_s: int) -> dict[str, Any]:
    """Returns the models that are offered: one per policy."""
    models = [
        {"id": policy, "object": "model", "created": created_s, "owned_by": "arbitrage"}
        for policy in policies
    ]
    return {"object": "list", "data": models}


def _object(body: bytes) -> dict[str, Any]:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage(
            "body", body[:100].decode("utf-8", "replace"), f"is no JSON ({error})", _DOCS
        ) from None
    if not isinstance(given, dict):
        raise MalformedMessage("body", given, "must be a JSON object", _DOCS)
    return given


def _asked(given: Mapping[str, Any]) -> _Body:
    for name, harmless in _NOT_OFFERED.items():
        value = given.get(name)
        if value is not None and value not in harmless:
            raise FieldInvalid(name, value, "asks for what is not offered here", "leave it out")
    kept = {
        name: value
        for name, value in given.items()
        if name not in _NOT_OFFERED and name not in _PASSED_OVER
    }
    try:
        return _Body.model_validate(kept)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or "body"
        problem = "is not known here" if first["type"] == "extra_forbidden" else first["msg"]
        raise FieldInvalid(name, first["input"], problem, _DOCS) from None


def _message(index: int, message: _Message) -> ChatMessage:
    where = f"messages.{index}"
    if message.role not in _ROLES:
        roles = ", ".join(_ROLES)
        raise FieldInvalid(f"{where}.role", message.role, "is no role here", f"give one of {roles}")
    for name, value in (message.model_extra or {}).items():
        if value:
            raise FieldInvalid(f"{where}.{name}", value, "is not taken here", "leave it out")
    content = message.content
    if not isinstance(content, list):
        return ChatMessage(_ROLES[message.role], content or "")
    for place, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise FieldInvalid(
                f"{where}.content.{place}.type", part.type, "is no text", "give text alone"
            )
    return ChatMessage(_ROLES[message.role], "".join(part.text or "" for part in content))


def _first(given: Any, otherwise: Any) -> Any:
    return otherwise if given is None else given


def _finish_reason(reason: StopReason) -> str:
    return "stop" if reason is StopReason.END_OF_SEQUENCE else "length"


def _usage(ledger: Ledger) -> dict[str, Any]:
    models = (ledger.draft, ledger.target)
    cached = sum(model.cached_count for model in models)
    prompt = cached + sum(model.prefill_count for model in models)
    completion = sum(model.kept_count for model in models)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _cost(reason: StopReason, ledger: Ledger) -> dict[str, Any]:
    return {
        "stop_reason": reason.value,
        "step_count": ledger.step_count,
        "escalation_rate": ledger.escalation_rate,
        "degraded_step_count": ledger.degraded_step_count,
        "draft_tokens": ledger.draft.decoded_count,
        "target_tokens": ledger.target.decoded_count,
        "discarded_tokens": ledger.draft.discarded_count + ledger.target.discarded_count,
        "elapsed_s": ledger.elapsed_s,
    }


def _told(committed: StepCommitted) -> dict[str, Any]:
    return {
        "step_index": committed.step_index,
        "source": committed.step.source.value,
        "escalated": committed.escalated,
        "degradations": [degradation.value for degradation in committed.degradations],
        "token_count": committed.token_count,
        "model": committed.writer.model_id,
    }
