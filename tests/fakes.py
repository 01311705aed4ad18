"""Small models with no weights: they say what a test's world says, and count what they are asked.

Fakes stand in for models only where the algorithm itself is under test. Everything else runs for
real.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field

from arbitrage.core.errors import ArbitrageError
from arbitrage.core.events import Event
from arbitrage.core.ports import Clock, Models, StepRequest
from arbitrage.core.speculation import SolutionRequest, generate_solution
from arbitrage.core.steps import GeneratedStep, ModelIdentity, Score, StopReason, Trajectory

DRAFT_MODEL = ModelIdentity("fake-draft", "d1")
TARGET_MODEL = ModelIdentity("fake-target", "t1")
PRM_MODEL = ModelIdentity("fake-prm", "p1")
ROUTER_MODEL = ModelIdentity("fake-router", "r1")


def step(
    text: str,
    stop_reason: StopReason = StopReason.SEPARATOR,
    token_count: int = 3,
    model: ModelIdentity = DRAFT_MODEL,
    entropy: float | None = None,
) -> GeneratedStep:
    """Returns a generated step with as little said as a test needs."""
    return GeneratedStep(text, stop_reason, token_count, model, entropy)


@dataclass
class FakeGenerator:
    """Writes what `write` says; with `stream_text`, one delta per character first."""

    write: Callable[[StepRequest], GeneratedStep]
    error: ArbitrageError | None = None
    requests: list[StepRequest] = field(default_factory=list)
    closed_early_count: int = 0

    async def generate_step(
        self, request: StepRequest
    ) -> AsyncGenerator[str | GeneratedStep, None]:
        self.requests.append(request)
        await asyncio.sleep(0)  # as a real model would, it lets other requests go on
        if self.error is not None:
            raise self.error
        written = self.write(request)
        finished = False
        try:
            if request.stream_text:
                for character in written.text:
                    yield character
            finished = True
            yield written
        finally:
            self.closed_early_count += not finished


@dataclass
class FakeScorer:
    """Scores with `score`, a function of prefix and step text."""

    score: Callable[[Trajectory, str], float]
    model: ModelIdentity = PRM_MODEL
    error: ArbitrageError | None = None
    call_count: int = 0

    async def score_step(self, trajectory: Trajectory, step_text: str) -> Score:
        self.call_count += 1
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return Score(self.score(trajectory, step_text), self.model, prefill_token_count=5)

    async def estimate_advantage(self, trajectory: Trajectory, draft_text: str) -> Score:
        return await self.score_step(trajectory, draft_text)


@dataclass(frozen=True)
class PoolStep:
    """One place of a solution as both models would write it, with what the judges would say."""

    draft_score: float
    target_score: float
    router_score: float = 0.5
    draft_tokens: int = 3
    target_tokens: int = 4
    entropy: float = 0.0


class PoolWorld:
    """A solution of fixed length whose every step both models have ready."""

    def __init__(self, pool: list[PoolStep]) -> None:
        self.pool = pool
        self.draft = FakeGenerator(self._draft)
        self.target = FakeGenerator(self._target)
        self.prm = FakeScorer(self._reward)
        self.router = FakeScorer(self._advantage, ROUTER_MODEL)

    @property
    def models(self) -> Models:
        """The four models of this world."""
        return Models(self.draft, self.target, self.prm, self.router)

    def _draft(self, request: StepRequest) -> GeneratedStep:
        index = len(request.trajectory.steps)
        at = self.pool[index]
        return step(f"draft {index}", self._stop(index), at.draft_tokens, DRAFT_MODEL, at.entropy)

    def _target(self, request: StepRequest) -> GeneratedStep:
        index = len(request.trajectory.steps)
        tokens = self.pool[index].target_tokens
        return step(f"target {index}", self._stop(index), tokens, TARGET_MODEL)

    def _stop(self, index: int) -> StopReason:
        last = index == len(self.pool) - 1
        return StopReason.END_OF_SEQUENCE if last else StopReason.SEPARATOR

    def _reward(self, trajectory: Trajectory, step_text: str) -> float:
        at = self.pool[len(trajectory.steps)]
        return at.draft_score if step_text.startswith("draft") else at.target_score

    def _advantage(self, trajectory: Trajectory, step_text: str) -> float:
        return self.pool[len(trajectory.steps)].router_score


@dataclass
class FakeClock:
    """Tells the time it was set to, moved by `tick_s` at each look."""

    now_s: float = 0.0
    tick_s: float = 0.0

    def __call__(self) -> float:
        self.now_s += self.tick_s
        return self.now_s


async def events_of(
    request: SolutionRequest, models: Models, clock: Clock | None = None
) -> list[Event]:
    """Runs a request to its end and returns its events."""
    found: list[Event] = []
    clock = clock or FakeClock()
    async with aclosing(generate_solution(request, models, clock)) as events:
        async for event in events:
            found.append(event)  # noqa: PERF401 — `aclosing` needs the loop
    return found


def texts_in_order(texts: list[str]) -> Callable[[StepRequest], GeneratedStep]:
    """Returns a writer that gives the next of `texts` at each call."""
    left: Iterator[str] = iter(texts)
    return lambda request: step(next(left))
