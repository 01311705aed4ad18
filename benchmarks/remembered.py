"""Model ports that ask each question once and replay its answer and its time.

A sweep over thresholds asks the same questions again and again. Under greedy decoding the answers
never differ, so they are asked for once, one call at a time, on an otherwise idle system; whoever
gets an answer later is charged the time that it took then.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from arbitrage.core.policies import written_step
from arbitrage.core.ports import Generator, Models, Router, Scorer, StepRequest
from arbitrage.core.steps import GeneratedStep, Score, Trajectory

ENTROPY_TOKEN_COUNT = 4
AnswerT = TypeVar("AnswerT")


class ReplayClock:
    """Tells the time that the calls of one solution have taken, one after the other."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        """Returns the seconds so far."""
        return self.now_s


class Memory(Generic[AnswerT]):
    """Answers by question, with the seconds each took."""

    def __init__(self) -> None:
        self.known: dict[object, tuple[AnswerT, float]] = {}

    async def answer(
        self, question: object, ask: Callable[[], Awaitable[AnswerT]], clock: ReplayClock | None
    ) -> AnswerT:
        """Returns the answer; its time passes on `clock`."""
        if question not in self.known:
            started_s = time.perf_counter()
            answer = await ask()
            self.known[question] = (answer, time.perf_counter() - started_s)
        answer, took_s = self.known[question]
        if clock is not None:
            clock.now_s += took_s
        return answer


@dataclass(frozen=True, slots=True)
class Memories:
    """What is known of each role, whatever policy asked for it."""

    draft: Memory[GeneratedStep]
    target: Memory[GeneratedStep]
    prm: Memory[Score]
    router: Memory[Score]

    @classmethod
    def empty(cls) -> Memories:
        """Returns memories of nothing."""
        return cls(Memory(), Memory(), Memory(), Memory())

    def models(self, inner: Models, clock: ReplayClock | None) -> Models:
        """Returns the ports of one solution; without a clock its questions cost nothing."""
        return Models(
            RememberedGenerator(inner.draft, self.draft, clock),
            RememberedGenerator(inner.target, self.target, clock),
            RememberedScorer(inner.prm, self.prm, clock),
            RememberedRouter(inner.router, self.router, clock),
        )


@dataclass(frozen=True, slots=True)
class RememberedGenerator:
    """Writes each prefix's step once, with the entropy of its first tokens."""

    inner: Generator
    memory: Memory[GeneratedStep]
    clock: ReplayClock | None

    async def generate_step(
        self, request: StepRequest
    ) -> AsyncGenerator[str | GeneratedStep, None]:
        """Yields the step."""
        asked = replace(request, entropy_token_count=ENTROPY_TOKEN_COUNT)
        texts = tuple((step.text, step.stop_reason) for step in request.trajectory.steps)
        question = (request.trajectory.problem, texts, request.max_tokens)
        yield await self.memory.answer(
            question, lambda: written_step(self.inner, asked), self.clock
        )


@dataclass(frozen=True, slots=True)
class RememberedScorer:
    """Scores each step once; who wrote the steps before it is nothing a PRM looks at."""

    inner: Scorer
    memory: Memory[Score]
    clock: ReplayClock | None

    async def score_step(self, trajectory: Trajectory, step_text: str) -> Score:
        """Returns the score."""
        texts = tuple(step.text for step in trajectory.steps)
        question = (trajectory.problem, texts, step_text)
        return await self.memory.answer(
            question, lambda: self.inner.score_step(trajectory, step_text), self.clock
        )


@dataclass(frozen=True, slots=True)
class RememberedRouter:
    """Judges each candidate once, in the light of who wrote the steps before it."""

    inner: Router
    memory: Memory[Score]
    clock: ReplayClock | None

    async def estimate_advantage(self, trajectory: Trajectory, draft_text: str) -> Score:
        """Returns the score."""
        return await self.memory.answer(
            (trajectory, draft_text),
            lambda: self.inner.estimate_advantage(trajectory, draft_text),
            self.clock,
        )
