"""What the event loop and a model's thread say to each other: jobs and their answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

from arbitrage.core.errors import ArbitrageError

T = TypeVar("T")


class Job(Protocol):
    """One request's way through the model, as the scheduler sees it.

    `tokens` is the prompt, then what was decoded; `limit_tokens` is how many there can be.
    Positions before `first_row` need not be computed where their keys and values are known.
    `fed_token_count` is how many tokens' keys and values are there, the `cached_token_count` known
    ones included; those of a job that `has_failed` are not kept.
    Everything but `is_cancelled` belongs to the scheduler's thread once the job is submitted.
    """

    tokens: list[int]
    limit_tokens: int
    first_row: int
    prompt_token_count: int
    cached_token_count: int
    fed_token_count: int
    is_cancelled: bool
    is_finished: bool

    @property
    def has_failed(self) -> bool:
        """Whether it ended with an error."""
        ...

    def rows(self, start: int, stop: int) -> Sequence[int]:
        """Returns the positions in [start, stop) whose hidden state it reads."""
        ...

    def check_time(self, now_s: float) -> None:
        """Finishes the job if its time is over."""
        ...

    def fail(self, error: ArbitrageError) -> None:
        """Finishes the job with an error."""
        ...

    def deliver(self) -> None:
        """Hands out the result, or the error, of the finished job."""
        ...


class Mailbox(Generic[T]):
    """Carries a job's answers from the scheduler's thread to the task that awaits them."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[T | ArbitrageError] = asyncio.Queue()

    def post(self, item: T | ArbitrageError) -> None:
        """Hands an answer over, from any thread."""
        # A loop that is closed, which it may become at any moment, has nobody left who waits.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def receive(self) -> T:
        """Waits for the next answer; an error is raised."""
        item = await self._queue.get()
        if isinstance(item, ArbitrageError):
            raise item
        return item
