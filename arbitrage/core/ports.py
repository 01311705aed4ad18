"""What the algorithm needs from the world: three models and a clock, each one small Protocol."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from arbitrage.core.calibration import CalibrationTable
from arbitrage.core.steps import GREEDY, GeneratedStep, ModelIdentity, Sampling, Score, Trajectory


@dataclass(frozen=True, slots=True)
class StepRequest:
    """Asks a generator for the step that follows a prefix.

    `max_tokens` bounds the decoded tokens; `entropy_token_count` is how many first tokens the
    mean entropy is taken over (0: none); `time_limit_s` is what is left of the request's time.
    """

    trajectory: Trajectory
    max_tokens: int
    sampling: Sampling = GREEDY
    entropy_token_count: int = 0
    stream_text: bool = False
    time_limit_s: float | None = None


class Generator(Protocol):
    """Writes steps."""

    def generate_step(self, request: StepRequest) -> AsyncGenerator[str | GeneratedStep, None]:
        """Yields text as it is decoded, where asked for, then exactly one result, last.

        Closing the iterator stops the model within one decoded token.

        Raises:
            ModelUnavailable: no replica answered.
        """
        ...


class Scorer(Protocol):
    """Judges a step by process reward."""

    async def score_step(self, trajectory: Trajectory, step_text: str) -> Score:
        """Returns the reward in [0, 1] of `step_text` as the next step of `trajectory`.

        Raises:
            ModelUnavailable: no replica answered.
        """
        ...


@dataclass(frozen=True, slots=True)
class RouterDescription:
    """What a router says of itself.

    A score, its logit shifted by `prior_logit_shift`, is the probability of an advantage above
    `advantage_margin`. `rejected_revision` is one that was to replace it and could not.
    """

    model: ModelIdentity
    default_threshold: float
    calibration: CalibrationTable
    is_annotated: bool
    score_rule: str
    prior_logit_shift: float = 0.0
    advantage_margin: float = 0.0
    rejected_revision: str = ""
    rejected_reason: str = ""


class Router(Protocol):
    """Predicts whether the target's step would have the higher reward."""

    async def estimate_advantage(self, trajectory: Trajectory, draft_text: str) -> Score:
        """Returns the probability in [0, 1] that the target's step beats `draft_text`.

        Raises:
            ModelUnavailable: no replica answered.
        """
        ...


class Clock(Protocol):
    """Tells time."""

    def __call__(self) -> float:
        """Returns monotonic seconds."""
        ...


@dataclass(frozen=True, slots=True)
class Models:
    """The models a request may call. A policy uses what it needs; the rest may be absent."""

    draft: Generator
    target: Generator
    prm: Scorer
    router: Router
