"""Engines without weights: they answer at once, or when a test lets them, and count."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from arbitrage.core.calibration import CalibrationTable
from arbitrage.core.ports import RouterDescription, StepRequest
from arbitrage.core.steps import (
    GeneratedStep,
    ModelIdentity,
    Score,
    Step,
    StopReason,
    Trajectory,
)
from services.engines.base import Advantage, EngineStats, StepScores

FAKE = ModelIdentity("fake", "r1")
CALIBRATION = CalibrationTable((0.25, 0.5, 0.75), (0.75, 0.5, 0.25))


@dataclass
class FakeEngine:
    """What every engine has."""

    identity: ModelIdentity = FAKE
    max_context_tokens: int = 4096
    error: Exception | None = None
    call_count: int = 0
    cancelled_count: int = 0
    # A test that clears it holds every call back until it is set again.
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.may_answer.set()

    async def answer(self) -> None:
        """Counts a call, waits until it may be answered, and fails where it should."""
        self.call_count += 1
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.cancelled_count += 1
            raise
        if self.error is not None:
            raise self.error

    def stats(self) -> EngineStats:
        """Says that nothing was ever done."""
        return EngineStats(0, 0, 0, 0, 0, 0, 1)

    async def warm_up(self) -> None:
        """Does nothing."""

    async def close(self) -> None:
        """Does nothing."""


def numbered(prefix: str, last: int) -> Callable[[StepRequest], GeneratedStep]:
    """Returns a writer of `last` steps: `<prefix> 0`, `<prefix> 1` and so on."""

    def write(request: StepRequest) -> GeneratedStep:
        index = len(request.trajectory.steps)
        stop = StopReason.END_OF_SEQUENCE if index + 1 >= last else StopReason.SEPARATOR
        return GeneratedStep(f"{prefix} {index}", stop, 3, ModelIdentity(prefix, "r1"), 0.5, 7, 2)

    return write


THREE_STEPS = numbered("step", 3)


@dataclass
class FakeGeneratorEngine(FakeEngine):
    """Writes what `write` says, with one delta per word where deltas are asked for."""

    write: Callable[[StepRequest], GeneratedStep] = THREE_STEPS
    requests: list[StepRequest] = field(default_factory=list)

    async def generate_step(
        self, request: StepRequest
    ) -> AsyncGenerator[str | GeneratedStep, None]:
        """Yields the deltas, then the step."""
        self.requests.append(request)
        step = self.write(request)
        if request.stream_text:
            for word in step.text.split(" "):
                yield word
        await self.answer()
        yield step


@dataclass
class FakePrmEngine(FakeEngine):
    """Gives every step the same score, unless a test says otherwise by its text."""

    score: float = 0.9
    family: str = "fake"
    score_of: Callable[[str], float] | None = None

    async def score_steps(
        self, problem: str, steps: tuple[Step, ...], skip_count: int = 0
    ) -> StepScores:
        """Scores the steps after the skipped ones."""
        await self.answer()
        score_of = self.score_of or (lambda text: self.score)
        scores = tuple(score_of(step.text) for step in steps[skip_count:])
        return StepScores(scores, self.identity, 11, 5)


@dataclass
class FakeRouterEngine(FakeEngine):
    """Gives every draft step the same score."""

    score: float = 0.5
    default_threshold: float = 0.4
    calibration: CalibrationTable = CALIBRATION

    @property
    def description(self) -> RouterDescription:
        """What this router says of itself."""
        return RouterDescription(
            self.identity, self.default_threshold, self.calibration, True, "softmax"
        )

    async def estimate_advantage(self, trajectory: Trajectory, draft_text: str) -> Advantage:
        """Returns the score."""
        await self.answer()
        return Advantage(Score(self.score, self.identity, 13, 4), truncated_token_count=2)
