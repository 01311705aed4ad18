"""Writes steps with a causal language model of transformers, many requests at once."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Sequence

from torch import Tensor

from arbitrage.core.errors import ArbitrageError, Internal
from arbitrage.core.ports import StepRequest
from arbitrage.core.steps import GeneratedStep, ModelIdentity, StopReason, Trajectory
from services.engines.base import EngineStats
from services.engines.engine_prompts import (
    ChatText,
    PlainText,
    PromptText,
    context_too_long,
    identity_with,
)
from services.engines.jobs import Mailbox
from services.engines.loading import LoadedModel
from services.engines.sampling import TokenSampler, entropy_nats
from services.engines.scheduler import EngineOptions, Scheduler
from services.engines.step_text import StepText


class _StepJob:
    """One step on its way: its tokens, its text so far, and when it ends."""

    def __init__(
        self, prompt: list[int], request: StepRequest, engine: TransformersGenerator
    ) -> None:
        self.tokens = prompt
        self.prompt_token_count = len(prompt)
        self.limit_tokens = len(prompt) + request.max_tokens
        self.first_row = len(prompt) - 1  # its logits give the first token
        self.cached_token_count = 0
        self.fed_token_count = 0
        self.is_cancelled = False
        self.is_finished = False
        self.mailbox: Mailbox[str | GeneratedStep] = Mailbox()
        self._request = request
        self._engine = engine
        self._text = StepText(
            engine.tokenizer.decode,
            engine.tokenizer.contains_newline,
            is_continuation=_is_continuation(request.trajectory),
        )
        sampling = request.sampling
        self._sampler = (
            TokenSampler(sampling, len(request.trajectory.steps)) if sampling.temperature else None
        )
        self._entropies: list[float] = []
        self._result: GeneratedStep | ArbitrageError | None = None
        self._deadline_s = (
            None if request.time_limit_s is None else time.monotonic() + request.time_limit_s
        )

    @property
    def has_failed(self) -> bool:
        """Whether it ended with an error."""
        return isinstance(self._result, ArbitrageError)

    def rows(self, start: int, stop: int) -> Sequence[int]:
        """Reads the newest token's row, once the prompt is through."""
        return (stop - 1,) if stop == len(self.tokens) else ()

    def check_time(self, now_s: float) -> None:
        """Ends the step with what it has once its time is over."""
        if self._deadline_s is not None and now_s >= self._deadline_s and not self.is_finished:
            self._finish(StopReason.DEADLINE)

    def fail(self, error: ArbitrageError) -> None:
        """Ends the step with an error."""
        self.is_finished = True
        self._result = error

    def deliver(self) -> None:
        """Hands out the step, or why there is none."""
        assert self._result is not None
        self.mailbox.post(self._result)

    def take(self, likeliest_id: int, logits: Tensor, row: int) -> None:
        """Decides on the next token from its row of `logits` [jobs, vocabulary].

        Also whether it is the last.
        """
        if self.is_cancelled:
            return
        if len(self._entropies) < self._request.entropy_token_count:
            self._entropies.append(entropy_nats(logits[row]))
        token_id = likeliest_id if self._sampler is None else self._sampler.draw(logits[row])
        self.tokens.append(token_id)
        if token_id in self._engine.end_ids:
            self._finish(StopReason.END_OF_SEQUENCE)
        elif self._text.push(token_id):
            self._finish(StopReason.SEPARATOR)
        elif len(self.tokens) == self.limit_tokens:
            self._finish(StopReason.STEP_LENGTH)
        elif self._request.stream_text:
            delta = self._text.take_delta()
            if delta:
                self.mailbox.post(delta)

    def _finish(self, reason: StopReason) -> None:
        self.is_finished = True
        is_cut = reason in (StopReason.STEP_LENGTH, StopReason.DEADLINE)
        text, delta = self._text.finish(is_cut=is_cut)
        if self._request.stream_text and delta:
            self.mailbox.post(delta)
        entropies = self._entropies
        self._result = GeneratedStep(
            text=text,
            stop_reason=reason,
            token_count=len(self.tokens) - self.prompt_token_count,
            model=self._engine.identity,
            first_token_entropy=sum(entropies) / len(entropies) if entropies else None,
            # A step whose time is over may end before its prompt is through.
            prefill_token_count=min(self.fed_token_count, self.prompt_token_count)
            - self.cached_token_count,
            cached_token_count=self.cached_token_count,
        )


def _is_continuation(trajectory: Trajectory) -> bool:
    steps = trajectory.steps
    return bool(steps) and steps[-1].stop_reason is StopReason.STEP_LENGTH


class TransformersGenerator:
    """Implements `GeneratorEngine` over a causal language model.

    The prompt is tokenised piece by piece, so a prefix keeps its ids as steps are added and its
    keys and values are reused. Greedy decoding takes the first of equally likely tokens. With
    `is_chat` the problem is put into the model's chat template.

    Raises:
        ModelLoadError: there is no such template.
    """

    def __init__(
        self, loaded: LoadedModel, options: EngineOptions | None = None, *, is_chat: bool = False
    ) -> None:
        self._prompts: PromptText = (
            ChatText(loaded.chat_tokenizer, loaded.reference) if is_chat else PlainText()
        )
        self._identity = identity_with(loaded.identity, self._prompts)
        self._head = loaded.head
        self.tokenizer = loaded.tokenizer
        self.end_ids = loaded.end_ids
        self._scheduler: Scheduler[_StepJob] = Scheduler(
            loaded.packed,
            self._read,
            options or EngineOptions(),
            f"generator {loaded.identity.model_id}",
        )

    @property
    def identity(self) -> ModelIdentity:
        """Names the weights."""
        return self._identity

    @property
    def max_context_tokens(self) -> int:
        """Tokens that fit the model's context, and the cache."""
        return self._scheduler.max_context_tokens

    def stats(self) -> EngineStats:
        """Returns what the engine is doing now."""
        return self._scheduler.stats()

    async def warm_up(self) -> None:
        """Writes two tokens."""
        request = StepRequest(Trajectory("1 + 1"), max_tokens=2)
        async for _ in self.generate_step(request):
            pass

    async def close(self) -> None:
        """Stops the model; steps still being written end with `NotServing`."""
        await self._scheduler.close()

    async def generate_step(self, request: StepRequest) -> AsyncGenerator[str | GeneratedStep]:
        """Yields text as it is decoded, where asked for, then exactly one result, last.

        Closing the iterator stops the model after the token it is decoding.

        Raises:
            ContextTooLong: prompt and budget do not fit the context; nothing was computed.
            Overloaded: the queue is full; nothing was computed.
            NotServing: the engine is closing.
            Internal: the model failed.
        """
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens: must be at least 1, got {request.max_tokens}")
        pieces = self._prompts.pieces(request.trajectory)
        least_count = self.tokenizer.least_token_count(pieces)
        if least_count + request.max_tokens > self.max_context_tokens:
            raise context_too_long(
                self.max_context_tokens, f"at least {least_count}", request.max_tokens
            )
        prompt = [] if self._prompts.has_start else list(self.tokenizer.start_ids)
        for ids in await self.tokenizer.encode_each_async(pieces):
            prompt += ids
        if len(prompt) + request.max_tokens > self.max_context_tokens:
            raise context_too_long(self.max_context_tokens, str(len(prompt)), request.max_tokens)
        job = _StepJob(prompt, request, self)
        self._scheduler.submit(job)
        try:
            while True:
                item = await job.mailbox.receive()
                yield item
                if isinstance(item, GeneratedStep):
                    return
        finally:
            job.is_cancelled = True

    def _read(self, hidden: Tensor, readers: Sequence[tuple[_StepJob, int]]) -> None:
        logits = self._head(hidden).float()  # [jobs, vocabulary]
        highest, likeliest_ids = logits.max(-1)
        likeliest = zip(likeliest_ids.tolist(), highest.tolist(), strict=True)
        for row, (likeliest_id, logit) in enumerate(likeliest):
            job = readers[row][0]
            # NaN counts as the highest, so this one logit tells whether there is any.
            if math.isfinite(logit):
                job.take(likeliest_id, logits, row)
            else:
                job.fail(Internal("the model computed a logit that is no finite number"))
