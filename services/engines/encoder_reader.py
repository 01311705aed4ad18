"""Reads an encoder's logits of token sequences, one sequence at a time.

Each new token changes what all others compute, so nothing of a sequence can be kept for the next
one: every call costs the whole sequence, in a forward of its own.
"""

from __future__ import annotations

import asyncio
import logging
import math
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from arbitrage.core.errors import Internal, NotServing, Overloaded
from services.engines.base import EngineStats
from services.engines.encoder import EncoderModel
from services.engines.scheduler import EngineOptions
from services.engines.sequence_reader import Reading, refuse_longer

_log = logging.getLogger(__name__)


class EncoderReader:
    """Does for an encoder what `SequenceReader` does for a decoder.

    `max_batch` and `max_queue` together bound the calls that are there at once.
    """

    def __init__(self, encoder: EncoderModel, options: EngineOptions | None, name: str) -> None:
        options = options or EngineOptions()
        self._encoder = encoder
        self._limit_calls = options.max_batch + options.max_queue
        self._calls = 0
        self._prefill_token_count = 0
        self._is_closing = False
        self._name = name
        self._executor = ThreadPoolExecutor(
            1, name, initializer=partial(_use_threads, options.cpu_threads)
        )
        self.max_context_tokens = encoder.max_context_tokens

    def stats(self) -> EngineStats:
        """Returns what the engine is doing now."""
        running = min(self._calls, 1)
        return EngineStats(
            queued_requests=self._calls - running,
            running_requests=running,
            decoded_token_count=0,
            prefill_token_count=self._prefill_token_count,
            cached_token_count=0,
            cache_bytes=0,
            cache_capacity_bytes=0,
        )

    async def close(self) -> None:
        """Stops after the forward it is in; calls still there end with `NotServing`."""
        self._is_closing = True
        await asyncio.to_thread(self._executor.shutdown)

    async def read(self, tokens: list[int], positions: Sequence[int]) -> Reading:
        """Returns the logits of `tokens` as a whole; `positions` must be the last one alone.

        Raises:
            ContextTooLong, Overloaded: nothing was computed.
            NotServing: the engine is closing.
            Internal: the model failed.
        """
        assert tuple(positions) == (len(tokens) - 1,), "an encoder judges a sequence as a whole"
        refuse_longer(len(tokens), self.max_context_tokens)
        if self._is_closing:
            raise NotServing("the engine is closing")
        if self._calls >= self._limit_calls:
            raise Overloaded(
                f"{self._calls} calls are there; retry or raise max_queue", retry_after_s=0.1
            )
        self._calls += 1
        try:
            # Cancelling the call takes it off the executor's queue.
            loop = asyncio.get_running_loop()
            logits = await loop.run_in_executor(self._executor, self._run, tokens)
        finally:
            self._calls -= 1
        return Reading([logits], len(tokens), 0)

    def _run(self, tokens: list[int]) -> list[float]:
        if self._is_closing:
            raise NotServing("the engine is closing")
        self._prefill_token_count += len(tokens)
        try:
            logits = self._encoder.logits(tokens)
        except Exception as error:  # noqa: BLE001 - the border of the thread; the trace is logged
            # An exception's own words may quote a prompt, so its kind and where it was must do.
            frames = "".join(traceback.format_tb(error.__traceback__))
            _log.error("%s: a forward failed (%s)\n%s", self._name, type(error).__name__, frames)
            raise Internal("the model failed; the log has the trace") from None
        if not all(map(math.isfinite, logits)):
            raise Internal("the model computed a logit that is no finite number")
        return logits


def _use_threads(count: int | None) -> None:
    if count is not None:
        torch.set_num_threads(count)
