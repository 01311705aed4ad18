"""Speaks `/v1/completions` with vLLM, SGLang, llama.cpp, KServe's runtime and their like.

They agree on the request and differ in how they say why a text ended. `finish_reason` is "stop" for
a stop string as well as for the model's own end; vLLM adds `stop_reason` and SGLang `matched_stop`,
which name the string or the token. A server that adds neither is not asked to stop at the
separator: whoever reads sees it in the text and closes the stream, so "stop" has one meaning.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from arbitrage.core.shown import one_line
from arbitrage.core.steps import GREEDY, SEPARATOR, StopReason
from services.engines.engine_http import (
    ConnectionBroken,
    EngineSetupError,
    HttpServer,
    ServerError,
    ServerOverloaded,
    ServerRefused,
    ServerUnavailable,
)
from services.engines.engine_server import (
    Completion,
    End,
    Piece,
    Prompt,
    ServedModel,
    entropy_of,
)
from services.engines.openai_models import served_model

_log = logging.getLogger(__name__)
# Some servers take 0 for "any token", some -1, and some neither; a number beyond every vocabulary
# means the same to all of them.
_ANY_TOKEN = 1 << 20
# What may be counted beyond a budget before a server is taken for one that keeps none: a piece that
# tells of no token counts as one.
_SLACK_TOKENS = 16
_HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())


def _checked_number(value: float) -> float:
    if math.isnan(value):
        raise ValueError("is not a number")
    return value


_Logprob = Annotated[float, AfterValidator(_checked_number)]


class _Likely(_Lenient):
    logprob: _Logprob | None = None


class _TokenLogprobs(_Likely):
    top_logprobs: list[_Likely] = []


class _Logprobs(_Lenient):
    token_logprobs: list[_Logprob | None] = []
    top_logprobs: list[dict[str, _Logprob | None] | None] | None = None
    content: list[_TokenLogprobs] | None = None  # llama-server, as in chat completions

    @property
    def token_count(self) -> int:
        """Tokens that it tells of; a server that tells of none has written one."""
        return max(len(self.token_logprobs), len(self.content or ()), 1)

    @property
    def likeliest(self) -> Iterator[tuple[float | None, ...]]:
        """What each token could have been, as log-probabilities."""
        for known in self.top_logprobs or ():
            yield tuple((known or {}).values())
        for token in self.content or ():
            yield tuple(likely.logprob for likely in token.top_logprobs)


class _Choice(_Lenient):
    text: str = ""
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # vLLM, and what is built on it
    matched_stop: int | str | list[int] | None = None  # SGLang

    @property
    def names_stops(self) -> bool:
        """Whether the server has a field that says what a text stopped at."""
        return bool(self.model_fields_set & {"stop_reason", "matched_stop"})


class _CachedTokens(_Lenient):
    cached_tokens: int | None = None


class _Usage(_Lenient):
    prompt_tokens: Annotated[int, Field(ge=0)] | None = None
    completion_tokens: Annotated[int, Field(ge=0)] | None = None
    prompt_tokens_details: _CachedTokens | None = None


class _Chunk(_Lenient):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


@dataclass(frozen=True, slots=True)
class _Dialect:
    """What one server takes and tells, as far as it is known."""

    takes_token_ids: bool
    top_logprobs: int
    # Fields beyond OpenAI's: some servers have defaults of their own that change what is drawn,
    # and a strict one refuses what it does not know.
    takes_extras: bool = True
    names_stops: bool = False


class OpenAiServer:
    """Implements `EngineServer` over an OpenAI-compatible completions API.

    `top_logprobs` is how many tokens' log-probabilities are asked for where an entropy is wanted.
    """

    def __init__(self, http: HttpServer, top_logprobs: int = 5) -> None:
        self._http = http
        self._model = ""
        self._dialect = _Dialect(True, top_logprobs)

    async def describe(self, model: str) -> ServedModel:
        """Looks for `model` among the server's, and tries out what it takes.

        Raises:
            EngineSetupError: it has no such model, or takes no request of ours.
            ServerError
        """
        served = await served_model(self._http, model)
        self._model = model
        await self._try_out()
        return served

    async def complete(self, completion: Completion) -> AsyncGenerator[Piece | End]:
        """Yields pieces, then one `End`, last.

        Raises:
            ServerError
        """
        dialect = self._dialect
        last: _Choice | None = None
        usage = _Usage()
        count = 0
        events = self._http.events("/v1/completions", self._body(completion, dialect))
        async with aclosing(events):
            async for event in events:
                chunk = self._chunk(event)
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    if choice.finish_reason is not None:
                        last = choice
                    if choice.text or choice.logprobs is not None:
                        piece = _piece(choice)
                        count += piece.token_count
                        self._check(piece, count, completion.max_tokens)
                        yield piece
        if last is None:
            raise ConnectionBroken(f"{self._http.url}: the stream ended without a finish_reason")
        if last.names_stops and not dialect.names_stops:
            self._dialect = replace(self._dialect, names_stops=True)
        details = usage.prompt_tokens_details
        yield End(
            self._stop_reason(last),
            usage.completion_tokens,
            usage.prompt_tokens,
            (details.cached_tokens or 0) if details is not None else 0,
        )

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.close()

    async def _try_out(self) -> None:
        """Makes a call that asks for everything, and asks for less where it is refused."""
        full = self._dialect
        without_logprobs = replace(full, top_logprobs=0)
        ladder = (
            full,
            replace(full, takes_token_ids=False),
            without_logprobs,
            replace(without_logprobs, takes_token_ids=False),
            _Dialect(takes_token_ids=False, top_logprobs=0, takes_extras=False),
        )
        refusal: ServerError | None = None
        for dialect in dict.fromkeys(ladder):
            try:
                self._dialect = await self._tried(dialect)
            except (ConnectionBroken, ServerOverloaded):
                raise
            except ServerError as error:
                # Some servers answer 500 to what they should have refused.
                refusal = refusal or error
                continue
            if full.top_logprobs and not self._dialect.top_logprobs:
                _log.warning(
                    "%s: gives no log-probabilities, so steps have no first-token entropy (%s)",
                    self._http.url,
                    refusal,
                )
            return
        assert refusal is not None
        if isinstance(refusal, ServerRefused):
            raise EngineSetupError(
                "engine_url",
                f"the server refuses a completion of two tokens: {refusal}",
                "name a server of a language model with /v1/completions",
            )
        raise refusal

    async def _tried(self, dialect: _Dialect) -> _Dialect:
        # Ids that every vocabulary has; two tokens, because one may be no whole character.
        prompt = Prompt("1 + 1 =", (1, 2, 3) if dialect.takes_token_ids else None)
        completion = Completion(prompt, 2, GREEDY, wants_entropy=True)
        events = self._http.events("/v1/completions", self._body(completion, dialect))
        has_logprobs = False
        async with aclosing(events):
            async for event in events:
                for choice in self._chunk(event).choices:
                    dialect = replace(
                        dialect, names_stops=dialect.names_stops or choice.names_stops
                    )
                    has_logprobs = has_logprobs or bool(_piece(choice).entropies)
        return dialect if has_logprobs else replace(dialect, top_logprobs=0)

    def _body(self, completion: Completion, dialect: _Dialect) -> dict[str, Any]:
        prompt, sampling = completion.prompt, completion.sampling
        takes_ids = dialect.takes_token_ids and prompt.token_ids is not None
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": prompt.token_ids if takes_ids else prompt.text,
            "max_tokens": completion.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stream": True,
            "n": 1,
        }
        if dialect.names_stops:
            body["stop"] = [SEPARATOR]
        if completion.seed is not None:
            body["seed"] = completion.seed
        if completion.wants_entropy and dialect.top_logprobs:
            body["logprobs"] = dialect.top_logprobs
        if dialect.takes_extras:
            body |= {
                "stream_options": {"include_usage": True},
                "top_k": sampling.top_k or _ANY_TOKEN,
                "min_p": 0.0,
                "repetition_penalty": 1.0,  # vLLM, SGLang
                "repeat_penalty": 1.0,  # llama.cpp
            }
        return body

    def _check(self, piece: Piece, count: int, max_tokens: int) -> None:
        if _HALF_CHARACTER.search(piece.text):
            raise ServerUnavailable(f"{self._http.url}: sent half a character")
        if count > max_tokens + _SLACK_TOKENS:
            raise ServerUnavailable(
                f"{self._http.url}: was asked for {max_tokens} tokens, and does not stop"
            )

    def _chunk(self, event: str) -> _Chunk:
        try:
            chunk = _Chunk.model_validate(self._http.parsed(event))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the event"
            raise ServerUnavailable(
                f"{self._http.url}: sent an event that cannot be read: {where}: {first['msg']}"
            ) from error
        if chunk.error is not None:
            said = chunk.error.get("message") if isinstance(chunk.error, dict) else chunk.error
            raise ServerUnavailable(
                f"{self._http.url}: failed while it wrote: {one_line(str(said), 400)}"
            )
        return chunk

    def _stop_reason(self, last: _Choice) -> StopReason:
        if last.finish_reason == "length":
            return StopReason.STEP_LENGTH
        if last.finish_reason in {"stop", "eos"}:
            stops = (last.stop_reason, last.matched_stop)
            at_separator = any(isinstance(stop, str) and SEPARATOR in stop for stop in stops)
            return StopReason.SEPARATOR if at_separator else StopReason.END_OF_SEQUENCE
        # vLLM says "abort" when it shuts down, and "error" when it failed.
        raise ConnectionBroken(f"{self._http.url}: gave up the text: {last.finish_reason!r}")


def _piece(choice: _Choice) -> Piece:
    logprobs = choice.logprobs
    if logprobs is None:
        return Piece(choice.text)
    entropies = tuple(
        entropy_of(-math.inf if value is None else value for value in likeliest)
        for likeliest in logprobs.likeliest
        if likeliest
    )
    return Piece(choice.text, entropies, logprobs.token_count)
