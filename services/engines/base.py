"""What a service needs of whatever runs its model. Each engine implements one of these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from arbitrage.core.ports import Generator, RouterDescription
from arbitrage.core.steps import ModelIdentity, Score, Step, Trajectory


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine is doing, read by the metrics endpoint. Counts only ever rise."""

    queued_requests: int
    running_requests: int
    decoded_token_count: int
    prefill_token_count: int
    cached_token_count: int
    cache_bytes: int
    cache_capacity_bytes: int


class Engine(Protocol):
    """Runs one model."""

    @property
    def identity(self) -> ModelIdentity:
        """Names the weights."""
        ...

    @property
    def max_context_tokens(self) -> int:
        """Tokens that fit the model's context."""
        ...

    def stats(self) -> EngineStats:
        """Returns what the engine is doing now."""
        ...

    async def warm_up(self) -> None:
        """Makes one small call, so that the first request does not pay for first-use costs."""
        ...

    async def close(self) -> None:
        """Stops the model; calls still running end with `NotServing`."""
        ...


class GeneratorEngine(Engine, Generator, Protocol):
    """Writes steps.

    `generate_step` raises `ContextTooLong` where prompt and budget do not fit the context, and
    `Overloaded` where the queue is full, before any work is done.
    """


@dataclass(frozen=True, slots=True)
class StepScores:
    """One score in [0, 1] per scored step, and what computing them took."""

    values: tuple[float, ...]
    model: ModelIdentity
    prefill_token_count: int = 0
    cached_token_count: int = 0


class PrmEngine(Engine, Protocol):
    """Scores steps by process reward."""

    @property
    def family(self) -> str:
        """Names the input format."""
        ...

    async def score_steps(
        self, problem: str, steps: tuple[Step, ...], skip_count: int = 0
    ) -> StepScores:
        """Scores the steps after the first `skip_count`.

        Raises:
            ContextTooLong, Overloaded
        """
        ...


@dataclass(frozen=True, slots=True)
class Advantage:
    """A router's score, and how many history tokens were cut from the left to fit."""

    score: Score
    truncated_token_count: int = 0


class RouterEngine(Engine, Protocol):
    """Judges draft steps."""

    @property
    def description(self) -> RouterDescription:
        """What the router says of itself."""
        ...

    async def estimate_advantage(self, trajectory: Trajectory, draft_text: str) -> Advantage:
        """Returns the probability that the target's step beats `draft_text`.

        Raises:
            ContextTooLong, Overloaded
        """
        ...
