"""The values the algorithm speaks of. All of them are frozen; a change returns a new one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

SEPARATOR = "\n\n"


class Source(Enum):
    """The deployment of the generator that wrote a step."""

    DRAFT = "draft"
    TARGET = "target"


class StopReason(Enum):
    """Why a step or a request ended. The engine decides it; nothing infers it from text."""

    SEPARATOR = "separator"
    END_OF_SEQUENCE = "end_of_sequence"
    STEP_LENGTH = "step_length"
    TOTAL_LENGTH = "total_length"
    STEP_LIMIT = "step_limit"
    REPETITION = "repetition"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    ERROR = "error"


class Degradation(Enum):
    """What a step went without."""

    TARGET_UNAVAILABLE = "target_unavailable"
    ROUTER_UNAVAILABLE = "router_unavailable"
    DRAFT_UNAVAILABLE = "draft_unavailable"
    TARGET_BUDGET = "target_budget"
    LOAD_PRICED_THRESHOLD = "load_priced_threshold"


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Names the exact weights that produced a text or a score."""

    model_id: str
    revision: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """Says how tokens are drawn. The default is greedy decoding."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    @property
    def is_deterministic(self) -> bool:
        """Whether equal prefixes give equal steps."""
        return self.temperature == 0.0 or self.seed is not None


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Step:
    """A committed step: its text without the separator, who wrote it, and why it ended."""

    text: str
    source: Source
    stop_reason: StopReason = StopReason.SEPARATOR


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A problem and the steps committed so far: the prefix `x` of the method."""

    problem: str
    steps: tuple[Step, ...] = ()

    def append(self, step: Step) -> Trajectory:
        """Returns the trajectory one step longer."""
        return Trajectory(self.problem, (*self.steps, step))


@dataclass(frozen=True, slots=True)
class GeneratedStep:
    """A step as a model wrote it, before anyone decided on it.

    `token_count` counts decoded tokens, the one that ended the step included.
    `first_token_entropy` is a mean in nats over the first tokens, where asked for.
    """

    text: str
    stop_reason: StopReason
    token_count: int
    model: ModelIdentity
    first_token_entropy: float | None = None
    prefill_token_count: int = 0
    cached_token_count: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to read. An empty step is not a step."""
        return not self.text.strip()

    @property
    def is_cut(self) -> bool:
        """Whether the step's token cap ended it, so that the next one continues its text."""
        return self.stop_reason is StopReason.STEP_LENGTH


@dataclass(frozen=True, slots=True)
class Score:
    """A number in [0, 1] that a model gave a step, and what computing it took."""

    value: float
    model: ModelIdentity
    prefill_token_count: int = 0
    cached_token_count: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """A policy's decision on one draft step, with everything it was based on.

    `target_step` is set by policies that had to see the target's step to decide. `is_load_priced`
    says that the target's load had raised `threshold`.
    """

    escalate: bool
    router_score: Score | None = None
    draft_score: Score | None = None
    target_score: Score | None = None
    first_token_entropy: float | None = None
    threshold: float | None = None
    target_step: GeneratedStep | None = None
    is_load_priced: bool = False
