"""Who decides between draft and target: seven rules behind one Protocol.

| policy              | escalates iff                                  | asks                  |
|---------------------|------------------------------------------------|-----------------------|
| arbitrage           | router score > escalation_threshold            | router                |
| rsd                 | draft's reward < acceptance_score              | PRM                   |
| oracle              | target's reward − draft's > advantage_threshold| target and PRM twice  |
| random              | a seeded coin falls so                         | nobody                |
| draft_only          | never                                          | nobody                |
| target_only         | always; the draft is not called                | nobody                |
| first_token_entropy | the draft was unsure of its first tokens       | nobody                |

Ties accept the draft. A policy sees one request's prefix and nothing else.
"""

from __future__ import annotations

import math
import random
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from arbitrage.core.errors import (
    DeadlineExceeded,
    FieldInvalid,
    Internal,
    PrmUnavailable,
    ThresholdOutOfRange,
)
from arbitrage.core.ports import Generator, Models, StepRequest
from arbitrage.core.steps import GeneratedStep, Source, StopReason, Verdict


class Policy(Protocol):
    """Decides what becomes of a draft step."""

    name: ClassVar[str]
    first_writer: ClassVar[Source]
    may_escalate: ClassVar[bool]

    @property
    def entropy_token_count(self) -> int:
        """First tokens whose entropy the draft has to report."""
        ...

    async def decide(self, request: StepRequest, draft: GeneratedStep, models: Models) -> Verdict:
        """Returns the verdict on `draft`; `request` is what the target would be asked."""
        ...


@dataclass(frozen=True, slots=True)
class ArbitragePolicy:
    """Escalates when the router expects the target to do better by enough."""

    name: ClassVar[str] = "arbitrage"
    first_writer: ClassVar[Source] = Source.DRAFT
    may_escalate: ClassVar[bool] = True
    entropy_token_count: ClassVar[int] = 0
    escalation_threshold: float

    def __post_init__(self) -> None:
        _check_range("arbitrage.escalation_threshold", self.escalation_threshold, 0.0, 1.0)

    async def decide(self, request: StepRequest, draft: GeneratedStep, models: Models) -> Verdict:
        """Asks the router once."""
        score = await models.router.estimate_advantage(request.trajectory, draft.text)
        return Verdict(
            escalate=score.value > self.escalation_threshold,
            router_score=score,
            threshold=self.escalation_threshold,
        )


@dataclass(frozen=True, slots=True)
class RsdPolicy:
    """Escalates when the draft step is not good enough in itself (arXiv 2501.19324)."""

    name: ClassVar[str] = "rsd"
    first_writer: ClassVar[Source] = Source.DRAFT
    may_escalate: ClassVar[bool] = True
    entropy_token_count: ClassVar[int] = 0
    acceptance_score: float = 0.7

    def __post_init__(self) -> None:
        _check_range("rsd.acceptance_score", self.acceptance_score, 0.0, 1.0)

    async def decide(self, request: StepRequest, draft: GeneratedStep, models: Models) -> Verdict:
        """Asks the PRM once."""
        score = await models.prm.score_step(request.trajectory, draft.text)
        return Verdict(
            escalate=score.value < self.acceptance_score,
            draft_score=score,
            threshold=self.acceptance_score,
        )


@dataclass(frozen=True, slots=True)
class OraclePolicy:
    """Escalates when the target's step really is better: the upper bound, for offline use."""

    name: ClassVar[str] = "oracle"
    first_writer: ClassVar[Source] = Source.DRAFT
    may_escalate: ClassVar[bool] = True
    entropy_token_count: ClassVar[int] = 0
    advantage_threshold: float = 0.0

    def __post_init__(self) -> None:
        _check_range("oracle.advantage_threshold", self.advantage_threshold, -1.0, 1.0)

    async def decide(self, request: StepRequest, draft: GeneratedStep, models: Models) -> Verdict:
        """Lets the target write the step too and compares the two rewards."""
        target = await written_step(models.target, replace(request, stream_text=False))
        draft_score = await models.prm.score_step(request.trajectory, draft.text)
        target_score = await models.prm.score_step(request.trajectory, target.text)
        if draft_score.model != target_score.model:
            # The PRM changed between the two calls, or one of them was remembered.
            raise PrmUnavailable(
                f"the PRM changed from {draft_score.model} to {target_score.model} within a step; "
                "their scores cannot be compared"
            )
        return Verdict(
            escalate=target_score.value - draft_score.value > self.advantage_threshold,
            draft_score=draft_score,
            target_score=target_score,
            threshold=self.advantage_threshold,
            target_step=target,
        )


@dataclass(frozen=True, slots=True)
class RandomPolicy:
    """Escalates by a coin that depends on seed, problem and step index alone: the control."""

    name: ClassVar[str] = "random"
    first_writer: ClassVar[Source] = Source.DRAFT
    may_escalate: ClassVar[bool] = True
    entropy_token_count: ClassVar[int] = 0
    escalation_rate: float
    seed: int = 0

    def __post_init__(self) -> None:
        _check_range("random.escalation_rate", self.escalation_rate, 0.0, 1.0)

    async def decide(self, request: StepRequest, draft: GeneratedStep, models: Models) -> Verdict:
        """Throws the coin."""
        trajectory = request.trajectory
        coin = random.Random(f"{self.seed}\0{len(trajectory.steps)}\0{trajectory.problem}")  # noqa: S311 — a reproducible control, not a secret
        return Verdict(
            escalate=coin.random() < self.escalation_rate, threshold=self.escalation_rate
        )


@dataclass(frozen=True, slots=True)
class DraftOnlyPolicy:
    """Never escalates."""

    name: ClassVar[str] = "draft_only"
    first_writer: ClassVar[Source] = Source.DRAFT
    may_escalate: ClassVar[bool] = False
    entropy_token_count: ClassVar[int] = 0

    async def decide(self, request: StepRequest, draft: GeneratedStep, models: Models) -> Verdict:
        """Accepts."""
        return Verdict(escalate=False)


@dataclass(frozen=True, slots=True)
class TargetOnlyPolicy:
    """Lets the target write every step."""

    name: ClassVar[str] = "target_only"
    first_writer: ClassVar[Source] = Source.TARGET
    may_escalate: ClassVar[bool] = True
    entropy_token_count: ClassVar[int] = 0

    async def decide(self, request: StepRequest, draft: GeneratedStep, models: Models) -> Verdict:
        """Is never asked, for there is no draft step."""
        raise Internal("target_only was asked to judge a draft step")


@dataclass(frozen=True, slots=True)
class FirstTokenEntropyPolicy:
    """Escalates when the draft was unsure of how to begin the step.

    `entropy_threshold` is a mean in nats over the first `token_count` tokens.
    """

    name: ClassVar[str] = "first_token_entropy"
    first_writer: ClassVar[Source] = Source.DRAFT
    may_escalate: ClassVar[bool] = True
    entropy_threshold: float
    token_count: int = 4

    def __post_init__(self) -> None:
        _check_range("first_token_entropy.entropy_threshold", self.entropy_threshold, 0.0, 100.0)
        if not 1 <= self.token_count <= 1024:
            raise FieldInvalid(
                "first_token_entropy.token_count",
                self.token_count,
                "must be between 1 and 1024",
                "give a count in that range or leave it out",
            )

    @property
    def entropy_token_count(self) -> int:
        """First tokens whose entropy the draft has to report."""
        return self.token_count

    async def decide(self, request: StepRequest, draft: GeneratedStep, models: Models) -> Verdict:
        """Compares what the draft reported."""
        entropy = draft.first_token_entropy
        if entropy is None:
            raise Internal("the draft reported no first-token entropy")
        return Verdict(
            escalate=entropy > self.entropy_threshold,
            first_token_entropy=entropy,
            threshold=self.entropy_threshold,
        )


POLICIES: tuple[type[Policy], ...] = (
    ArbitragePolicy,
    RsdPolicy,
    OraclePolicy,
    RandomPolicy,
    DraftOnlyPolicy,
    TargetOnlyPolicy,
    FirstTokenEntropyPolicy,
)


def _check_range(field: str, value: float, least: float, most: float) -> None:
    if math.isnan(value) or not least <= value <= most:
        raise ThresholdOutOfRange(
            field,
            value,
            f"must be between {least:g} and {most:g}",
            "give a number in that range",
        )


async def written_step(generator: Generator, request: StepRequest) -> GeneratedStep:
    """Returns the step a generator writes, without its text on the way.

    Raises:
        DeadlineExceeded: the request's time was over before the step was.
        ModelUnavailable: no replica answered.
    """
    async with aclosing(generator.generate_step(request)) as items:
        async for item in items:
            if isinstance(item, GeneratedStep):
                if item.stop_reason is StopReason.DEADLINE:
                    raise DeadlineExceeded("the time limit was over before the step was")
                return item
    raise Internal("a generator's stream ended without a result")
