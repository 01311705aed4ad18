"""Writes steps with a model that another server runs."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from arbitrage.core.errors import ModelUnavailable, NotServing, Overloaded
from arbitrage.core.ports import StepRequest
from arbitrage.core.steps import SEPARATOR, GeneratedStep, ModelIdentity, StopReason, Trajectory
from services.engines.base import EngineStats
from services.engines.engine_http import (
    ConnectionBroken,
    ServerError,
    ServerOverloaded,
    ServerRefused,
)
from services.engines.engine_prompts import PromptText, context_too_long
from services.engines.engine_server import Completion, End, EngineServer, Piece, Prompt, seed_of
from services.engines.step_text import PieceText
from services.engines.tokenization import PieceTokenizer

_log = logging.getLogger(__name__)
# A server that is asked for text it cannot hold says so in words of its own.
_OF_CONTEXT = re.compile(
    r"context|max_(model_len|total_tokens|new_tokens|input)|too (long|many)"
    r"|must have less than \d+ tokens",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """A model on a server: its name, how its prompts are written, and what fits it.

    `tokenizer` is None where only the server can tokenise; `unavailable` is what a server that
    does not answer means to a caller.
    """

    identity: ModelIdentity
    prompts: PromptText
    tokenizer: PieceTokenizer | None
    max_context_tokens: int
    max_calls: int
    unavailable: type[ModelUnavailable]


@dataclass
class _Counts:
    """What all calls took together."""

    running: int = 0
    decoded: int = 0
    prefilled: int = 0
    cached: int = 0


@dataclass
class _StepUnderWay:
    """What is known of a step while servers write it, in one call or more."""

    request: StepRequest
    text: PieceText
    token_count: int = 0
    seen_token_count: int = 0  # in the call that is under way
    prefill_token_count: int = 0
    cached_token_count: int = 0
    entropies: list[float] = field(default_factory=list)
    round_index: int = 0
    has_told: bool = False

    @property
    def left_tokens(self) -> int:
        """Tokens it may still have."""
        return self.request.max_tokens - self.token_count

    def take(self, piece: Piece) -> None:
        """Adds a piece, and of its entropies those of the first tokens that were asked for."""
        self.text.add(piece.text)
        self.seen_token_count += piece.token_count
        left = self.request.entropy_token_count - len(self.entropies)
        self.entropies += piece.entropies[: max(left, 0)]

    def take_counts(self, prompt: Prompt, end: End) -> None:
        """Adds what a call took; of a server that does not tell, what was sent and seen."""
        count = self.seen_token_count if end.token_count is None else end.token_count
        self.seen_token_count = 0
        # A call that ends has written a token, or a model that says nothing is asked for ever.
        self.token_count += max(count, 1)
        if self.round_index == 0:
            prompt_count = end.prompt_token_count
            if prompt_count is None:
                prompt_count = len(prompt.token_ids or ())
            self.cached_token_count = end.cached_token_count
            self.prefill_token_count = max(prompt_count - end.cached_token_count, 0)
        self.round_index += 1


class RemoteGenerator:
    """Implements `GeneratorEngine` over an `EngineServer`.

    A step may take more calls than one: where a server stops at a separator that closes nothing,
    because only blanks stand before it, the next call goes on behind it; and a connection that
    breaks is tried once more.
    """

    def __init__(self, server: EngineServer, model: RemoteModel) -> None:
        self._server = server
        self._model = model
        self._counts = _Counts()
        self._is_closing = False

    @property
    def identity(self) -> ModelIdentity:
        """Names the weights."""
        return self._model.identity

    @property
    def max_context_tokens(self) -> int:
        """Tokens that fit the model's context."""
        return self._model.max_context_tokens

    def stats(self) -> EngineStats:
        """Returns what is asked of the server now; its memory and its queue are its own."""
        counts = self._counts
        return EngineStats(
            queued_requests=0,
            running_requests=counts.running,
            decoded_token_count=counts.decoded,
            prefill_token_count=counts.prefilled,
            cached_token_count=counts.cached,
            cache_bytes=0,
            cache_capacity_bytes=0,
        )

    async def warm_up(self) -> None:
        """Writes two tokens."""
        async for _ in self.generate_step(StepRequest(Trajectory("1 + 1"), max_tokens=2)):
            pass

    async def close(self) -> None:
        """Closes the connections; steps still being written end with `NotServing`."""
        self._is_closing = True
        await self._server.close()

    async def generate_step(self, request: StepRequest) -> AsyncGenerator[str | GeneratedStep]:
        """Yields text as it comes, where asked for, then exactly one result, last.

        Closing the iterator closes the connection, on which the server stops.

        Raises:
            ContextTooLong: prompt and budget do not fit the context.
            Overloaded: too many calls are under way, here or at the server.
            NotServing: the engine is closing.
            ModelUnavailable: the server gives no answer that can be used.
            Internal: the server refuses what it is asked.
        """
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens: must be at least 1, got {request.max_tokens}")
        if self._is_closing:
            raise NotServing("the engine is closing")
        if self._counts.running >= self._model.max_calls:
            raise Overloaded(
                f"{self._counts.running} calls of the model's server are under way; come back, or "
                "raise ARBITRAGE_MAX_BATCH or ARBITRAGE_MAX_QUEUE"
            )
        self._counts.running += 1
        try:
            async with aclosing(self._written(request)) as items:
                async for item in items:
                    yield item
        except ServerError as error:
            if self._is_closing:
                raise NotServing("the engine is closing") from error
            if isinstance(error, ServerRefused) and _OF_CONTEXT.search(error.said):
                raise context_too_long(
                    self.max_context_tokens, "more", request.max_tokens
                ) from error
            if not isinstance(error, ServerOverloaded):
                _log.warning("the model's server failed: %s; its caller is told more", error.kind)
            raise error.as_core(self._model.unavailable) from error
        finally:
            self._counts.running -= 1

    async def _written(self, request: StepRequest) -> AsyncGenerator[str | GeneratedStep]:
        steps = request.trajectory.steps
        is_continuation = bool(steps) and steps[-1].stop_reason is StopReason.STEP_LENGTH
        step = _StepUnderWay(request, PieceText(is_continuation=is_continuation))
        deadline_s = (
            None
            if request.time_limit_s is None
            else asyncio.get_running_loop().time() + request.time_limit_s
        )
        reason: StopReason | None = None
        try:
            while reason is None:
                async with aclosing(self._round(step, deadline_s)) as items:
                    async for item in items:
                        if isinstance(item, str):
                            step.has_told = True
                            yield item
                        else:
                            reason = self._ended(step, item)
        except TimeoutError:
            reason = StopReason.DEADLINE
            step.token_count += step.seen_token_count
        if reason in (StopReason.STEP_LENGTH, StopReason.DEADLINE):
            step.text.drop_half_character()
        text, delta = step.text.finish()
        if request.stream_text and delta:
            yield delta
        yield self._result(step, text, reason)

    def _ended(self, step: _StepUnderWay, reason: StopReason) -> StopReason | None:
        """Returns why the step ended; None where it goes on."""
        if reason is StopReason.SEPARATOR and not step.text.is_closed:
            step.text.add(SEPARATOR)
        if reason is not StopReason.SEPARATOR or step.text.is_closed:
            return reason
        # Only blanks stand before it.
        return None if step.left_tokens > 0 else StopReason.STEP_LENGTH

    async def _round(
        self, step: _StepUnderWay, deadline_s: float | None
    ) -> AsyncGenerator[str | StopReason]:
        """Makes one call for the step, and once more where its connection breaks."""
        completion = await self._completion(step)
        begin, entropy_count = len(step.text.text), len(step.entropies)
        is_repeat = False
        while True:
            try:
                async with aclosing(self._call(step, completion, deadline_s)) as items:
                    async for item in items:
                        yield item
                return
            except ConnectionBroken as error:
                # What was told cannot be taken back, so it has to come again.
                may_repeat = not step.has_told or step.request.sampling.is_deterministic
                if is_repeat or not may_repeat or self._is_closing:
                    raise
                _log.warning("%s; asking once more", error)
                is_repeat = True
                step.text.rewind(begin)
                step.seen_token_count = 0
                del step.entropies[entropy_count:]

    async def _call(
        self, step: _StepUnderWay, completion: Completion, deadline_s: float | None
    ) -> AsyncGenerator[str | StopReason]:
        """Makes one call, and yields deltas, then the reason it ended for."""
        end: End | None = None
        async with aclosing(self._server.complete(completion)) as items:
            while end is None:
                async with asyncio.timeout_at(deadline_s):
                    item = await anext(items)
                if isinstance(item, End):
                    end = item
                    break
                step.take(item)
                if step.text.is_closed:
                    end = End(StopReason.SEPARATOR)
                elif step.request.stream_text and (delta := step.text.take_delta()):
                    yield delta
        step.take_counts(completion.prompt, end)
        yield end.stop_reason

    async def _completion(self, step: _StepUnderWay) -> Completion:
        request = step.request
        return Completion(
            await self._prompt(step),
            step.left_tokens,
            request.sampling,
            seed_of(request.sampling, len(request.trajectory.steps), step.round_index),
            wants_entropy=len(step.entropies) < request.entropy_token_count,
        )

    async def _prompt(self, step: _StepUnderWay) -> Prompt:
        prompts, tokenizer = self._model.prompts, self._model.tokenizer
        pieces = (*prompts.pieces(step.request.trajectory), step.text.text)
        text = "".join(pieces)
        if tokenizer is None:
            return Prompt(text)
        left_tokens = step.left_tokens
        least_count = tokenizer.least_token_count(pieces)
        if least_count + left_tokens > self.max_context_tokens:
            raise context_too_long(self.max_context_tokens, f"at least {least_count}", left_tokens)
        start = () if prompts.has_start else tokenizer.start_ids
        ids = [*start, *(i for piece in await tokenizer.encode_each_async(pieces) for i in piece)]
        if len(ids) + left_tokens > self.max_context_tokens:
            raise context_too_long(self.max_context_tokens, str(len(ids)), left_tokens)
        if prompts.has_start and tokenizer.start_ids:
            # A server that tokenises the text begins it with the same token.
            text = text.removeprefix(tokenizer.start_text)
        return Prompt(text, tuple(ids))

    def _result(self, step: _StepUnderWay, text: str, reason: StopReason) -> GeneratedStep:
        entropies = step.entropies
        self._counts.decoded += step.token_count
        self._counts.prefilled += step.prefill_token_count
        self._counts.cached += step.cached_token_count
        return GeneratedStep(
            text=text,
            stop_reason=reason,
            token_count=step.token_count,
            model=self.identity,
            first_token_entropy=sum(entropies) / len(entropies) if entropies else None,
            prefill_token_count=step.prefill_token_count,
            cached_token_count=step.cached_token_count,
        )
