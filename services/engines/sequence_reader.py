"""Reads a classifier's logits at chosen positions of token sequences, many at once.

A sequence's keys and values are kept: one that starts alike costs only the tokens that differ.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from arbitrage.core.errors import ArbitrageError, ContextTooLong, Internal
from services.engines.jobs import Mailbox
from services.engines.loading import LoadedModel
from services.engines.scheduler import EngineOptions, Scheduler


@dataclass(frozen=True, slots=True)
class Reading:
    """Logits [positions, labels] of one sequence, and the tokens computed and known for it."""

    logits: list[list[float]]
    prefill_token_count: int
    cached_token_count: int


def refuse_longer(least_count: int, max_context_tokens: int) -> None:
    """Raises `ContextTooLong` where that many tokens, or more, do not fit."""
    if least_count > max_context_tokens:
        raise ContextTooLong(
            "steps",
            f"{least_count} tokens or more",
            f"problem and steps do not fit the context of {max_context_tokens} tokens",
            "send a shorter problem or fewer steps, or use a model with a longer context",
        )


class _ScoreJob:
    """One sequence on its way: the positions whose logits are wanted, and those read so far."""

    def __init__(self, tokens: list[int], positions: Sequence[int]) -> None:
        self.tokens = tokens
        self.prompt_token_count = self.limit_tokens = len(tokens)
        self.first_row = positions[0]
        self.cached_token_count = 0
        self.fed_token_count = 0
        self.is_cancelled = False
        self.is_finished = False
        self.logits: list[list[float]] = []
        self.mailbox: Mailbox[Reading] = Mailbox()
        self._positions = positions
        self._error: ArbitrageError | None = None

    @property
    def has_failed(self) -> bool:
        """Whether it ended with an error."""
        return self._error is not None

    def rows(self, start: int, stop: int) -> Sequence[int]:
        """Reads the rows of the wanted positions."""
        first = bisect_left(self._positions, start)
        return self._positions[first : bisect_left(self._positions, stop, first)]

    def check_time(self, now_s: float) -> None:
        """Does nothing: one forward is over soon enough."""

    def fail(self, error: ArbitrageError) -> None:
        """Ends the job with an error."""
        self._error = error
        self.is_finished = True

    def take(self, logits: list[list[float]]) -> None:
        """Adds the logits of the next wanted positions."""
        if not all(math.isfinite(logit) for row in logits for logit in row):
            self.fail(Internal("the model computed a logit that is no finite number"))
            return
        self.logits.extend(logits)
        self.is_finished = len(self.logits) == len(self._positions)

    def deliver(self) -> None:
        """Hands out the logits, or why there are none."""
        if self._error is not None:
            self.mailbox.post(self._error)
            return
        known_count = self.cached_token_count
        self.mailbox.post(Reading(self.logits, self.prompt_token_count - known_count, known_count))


class SequenceReader:
    """Returns a classifier's logits at chosen positions of token sequences."""

    def __init__(self, loaded: LoadedModel, options: EngineOptions | None, name: str) -> None:
        self._head = loaded.head
        self._scheduler: Scheduler[_ScoreJob] = Scheduler(
            loaded.packed,
            self._take,
            options or EngineOptions(),
            f"{name} {loaded.identity.model_id}",
        )
        self.max_context_tokens = self._scheduler.max_context_tokens
        self.stats = self._scheduler.stats
        self.close = self._scheduler.close

    async def read(self, tokens: list[int], positions: Sequence[int]) -> Reading:
        """Runs the model over `tokens` and returns its logits at the rising `positions`.

        Cancelling the call takes it out of the batch before the next forward.

        Raises:
            ContextTooLong, Overloaded: nothing was computed.
            NotServing: the engine is closing.
            Internal: the model failed.
        """
        refuse_longer(len(tokens), self.max_context_tokens)
        job = _ScoreJob(tokens, positions)
        self._scheduler.submit(job)
        try:
            return await job.mailbox.receive()
        finally:
            job.is_cancelled = True

    def _take(self, hidden: Tensor, readers: Sequence[tuple[_ScoreJob, int]]) -> None:
        logits = self._head(hidden).float()  # [rows, labels]
        rows = iter(logits.tolist())
        for job, row_count in readers:
            job.take(list(islice(rows, row_count)))
