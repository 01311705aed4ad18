"""The policies as a caller asks for them. Pure; `core.policies` holds the rules themselves.

Whether a number lies in its range is the server's to say, so that there is one truth about it;
what makes no sense together is refused here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from arbitrage.core.errors import FieldInvalid, PolicyUnknown, ThresholdOutOfRange
from arbitrage.fields import UINT32, UINT64, integer_field, real_field
from arbitrage.v1 import orchestrator_pb2


@dataclass(frozen=True, slots=True)
class Arbitrage:
    """Escalates by predicted advantage.

    Give `escalation_threshold`, or `target_share` (the share of steps the target may write), or
    neither for the router's default threshold. While the target has too much to do, the threshold
    may rise to `max_escalation_threshold`, and steps say so; without it, it never does.
    """

    name: ClassVar[str] = "arbitrage"
    escalation_threshold: float | None = None
    target_share: float | None = None
    max_escalation_threshold: float | None = None

    def __post_init__(self) -> None:
        if self.escalation_threshold is not None and self.target_share is not None:
            raise FieldInvalid(
                "arbitrage.target_share",
                self.target_share,
                "cannot stand beside escalation_threshold",
                "give one of the two",
            )
        least, most = self.escalation_threshold, self.max_escalation_threshold
        if least is not None and most is not None and most < least:
            raise ThresholdOutOfRange(
                "arbitrage.max_escalation_threshold",
                most,
                f"must not be below escalation_threshold, {least:g}",
                "give a number from there to 1, or leave it out",
            )

    def to_proto(self) -> orchestrator_pb2.ArbitragePolicy:
        """Returns the message."""
        return orchestrator_pb2.ArbitragePolicy(
            escalation_threshold=real_field(
                "arbitrage.escalation_threshold", self.escalation_threshold
            ),
            target_share=real_field("arbitrage.target_share", self.target_share),
            max_escalation_threshold=real_field(
                "arbitrage.max_escalation_threshold", self.max_escalation_threshold
            ),
        )


@dataclass(frozen=True, slots=True)
class Rsd:
    """Escalates draft steps whose process reward is below `acceptance_score`."""

    name: ClassVar[str] = "rsd"
    acceptance_score: float | None = None

    def to_proto(self) -> orchestrator_pb2.RsdPolicy:
        """Returns the message."""
        return orchestrator_pb2.RsdPolicy(
            acceptance_score=real_field("rsd.acceptance_score", self.acceptance_score)
        )


@dataclass(frozen=True, slots=True)
class Oracle:
    """Escalates where the target's step really scores higher by `advantage_threshold`."""

    name: ClassVar[str] = "oracle"
    advantage_threshold: float = 0.0

    def to_proto(self) -> orchestrator_pb2.OraclePolicy:
        """Returns the message."""
        return orchestrator_pb2.OraclePolicy(
            advantage_threshold=real_field("oracle.advantage_threshold", self.advantage_threshold)
        )


@dataclass(frozen=True, slots=True)
class Random:
    """Escalates with probability `escalation_rate`, by a seeded coin."""

    name: ClassVar[str] = "random"
    escalation_rate: float
    seed: int = 0

    def to_proto(self) -> orchestrator_pb2.RandomPolicy:
        """Returns the message."""
        return orchestrator_pb2.RandomPolicy(
            escalation_rate=real_field("random.escalation_rate", self.escalation_rate),
            seed=integer_field(FieldInvalid, "random.seed", self.seed, UINT64),
        )


@dataclass(frozen=True, slots=True)
class DraftOnly:
    """Never escalates."""

    name: ClassVar[str] = "draft_only"

    def to_proto(self) -> orchestrator_pb2.DraftOnlyPolicy:
        """Returns the message."""
        return orchestrator_pb2.DraftOnlyPolicy()


@dataclass(frozen=True, slots=True)
class TargetOnly:
    """Lets the target write every step."""

    name: ClassVar[str] = "target_only"

    def to_proto(self) -> orchestrator_pb2.TargetOnlyPolicy:
        """Returns the message."""
        return orchestrator_pb2.TargetOnlyPolicy()


@dataclass(frozen=True, slots=True)
class FirstTokenEntropy:
    """Escalates where the mean entropy of the draft's first tokens is above a bound, in nats."""

    name: ClassVar[str] = "first_token_entropy"
    entropy_threshold: float
    token_count: int | None = None

    def to_proto(self) -> orchestrator_pb2.FirstTokenEntropyPolicy:
        """Returns the message."""
        count = self.token_count
        field = "first_token_entropy.token_count"
        return orchestrator_pb2.FirstTokenEntropyPolicy(
            entropy_threshold=real_field(
                "first_token_entropy.entropy_threshold", self.entropy_threshold
            ),
            token_count=None
            if count is None
            else integer_field(FieldInvalid, field, count, UINT32),
        )


PolicySpec = Arbitrage | Rsd | Oracle | Random | DraftOnly | TargetOnly | FirstTokenEntropy

POLICY_NAMES: tuple[str, ...] = tuple(
    spec.name for spec in (Arbitrage, Rsd, Oracle, Random, DraftOnly, TargetOnly, FirstTokenEntropy)
)


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    """What a command line or a form says about a policy, before it is known to make sense.

    `threshold` is the policy's own number: escalation threshold, acceptance score, advantage
    threshold, escalation rate or entropy threshold.
    """

    threshold: float | None = None
    target_share: float | None = None
    seed: int | None = None
    token_count: int | None = None
    max_threshold: float | None = None


def policy_named(name: str, options: PolicyOptions = PolicyOptions()) -> PolicySpec:
    """Returns the policy of that name with those options.

    >>> policy_named("arbitrage", PolicyOptions(target_share=0.3))
    Arbitrage(escalation_threshold=None, target_share=0.3, max_escalation_threshold=None)

    Raises:
        PolicyUnknown: there is no such policy.
        FieldInvalid: an option the policy needs is missing, or one it does not know is there.
    """
    threshold = options.threshold
    match name:
        case "arbitrage":
            _refuse_others(name, options, "threshold", "target_share", "max_threshold")
            return Arbitrage(threshold, options.target_share, options.max_threshold)
        case "rsd":
            _refuse_others(name, options, "threshold")
            return Rsd(threshold)
        case "oracle":
            _refuse_others(name, options, "threshold")
            return Oracle(0.0 if threshold is None else threshold)
        case "random":
            _refuse_others(name, options, "threshold", "seed")
            rate = _required(name, threshold, "the probability in [0, 1] of an escalation")
            return Random(rate, 0 if options.seed is None else options.seed)
        case "draft_only":
            _refuse_others(name, options)
            return DraftOnly()
        case "target_only":
            _refuse_others(name, options)
            return TargetOnly()
        case "first_token_entropy":
            _refuse_others(name, options, "threshold", "token_count")
            bound = _required(name, threshold, "an entropy in nats, such as 0.5")
            return FirstTokenEntropy(bound, options.token_count)
        case _:
            raise PolicyUnknown(
                "policy", name, "is no policy", f"give one of {', '.join(POLICY_NAMES)}"
            )


def _refuse_others(name: str, options: PolicyOptions, *known: str) -> None:
    for option in ("threshold", "target_share", "seed", "token_count", "max_threshold"):
        value = getattr(options, option)
        if value is not None and option not in known:
            takes = " or ".join(known) if known else "no options"
            raise FieldInvalid(option, value, f"means nothing to {name}", f"{name} takes {takes}")


def _required(name: str, threshold: float | None, what: str) -> float:
    if threshold is None:
        raise FieldInvalid("threshold", "nothing", f"is needed by {name}", f"give {what}")
    return threshold
