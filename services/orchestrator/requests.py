"""Turns a request for a solution into core values, or refuses it by the field that is wrong."""

from __future__ import annotations

from dataclasses import dataclass

from arbitrage.core.errors import (
    CalibrationUnavailable,
    FieldInvalid,
    PolicyUnknown,
    ProblemEmpty,
    ThresholdOutOfRange,
)
from arbitrage.core.limits import Budgets, Caps, check_budgets, check_problem
from arbitrage.core.policies import (
    ArbitragePolicy,
    DraftOnlyPolicy,
    FirstTokenEntropyPolicy,
    OraclePolicy,
    Policy,
    RandomPolicy,
    RsdPolicy,
    TargetOnlyPolicy,
)
from arbitrage.core.ports import RouterDescription
from arbitrage.core.steps import Sampling
from arbitrage.v1 import orchestrator_pb2
from services.rpc.convert import duration_from_proto, sampling_from_proto, shortest

_ROLES = (
    orchestrator_pb2.CHAT_ROLE_SYSTEM,
    orchestrator_pb2.CHAT_ROLE_USER,
    orchestrator_pb2.CHAT_ROLE_ASSISTANT,
)
# Looking at each message of a chat holds up every other request.
_MOST_MESSAGES = 65_536


@dataclass(frozen=True, slots=True)
class RouterThreshold:
    """Asks for the `arbitrage` policy at a threshold that only the router can tell.

    With a `target_share` its calibration table gives it, otherwise its default.
    """

    target_share: float | None

    def policy(self, router: RouterDescription) -> ArbitragePolicy:
        """Returns the policy at that router's threshold.

        Raises:
            CalibrationUnavailable: a share was asked for and the router has no table.
        """
        if self.target_share is None:
            return ArbitragePolicy(router.default_threshold)
        if not router.calibration:
            raise CalibrationUnavailable(
                "arbitrage.target_share: the router has no calibration table; give "
                "arbitrage.escalation_threshold, or deploy a router with a table"
            )
        return ArbitragePolicy(router.calibration.threshold_for(self.target_share))


@dataclass(frozen=True, slots=True)
class AskedSolution:
    """What a caller asks for, checked as far as it can be without asking a model."""

    problem: str
    policy: Policy | RouterThreshold
    budgets: Budgets
    sampling: Sampling
    allow_degraded: bool
    stream_text: bool


@dataclass(frozen=True, slots=True)
class RequestRules:
    """What this server takes: its caps, its defaults, and the policies its models allow."""

    caps: Caps
    default_budgets: Budgets
    policies: tuple[str, ...]

    def asked(self, message: orchestrator_pb2.GenerateSolutionRequest) -> AskedSolution:
        """Returns what `message` asks for.

        Raises:
            InvalidRequest: one of its leaves, naming field, value and fix.
        """
        problem = _problem(message)
        check_problem(problem, self.caps)
        policy = self._policy(message)
        budgets = _budgets(message.budgets, self.default_budgets)
        check_budgets(budgets, self.caps)
        return AskedSolution(
            problem,
            policy,
            budgets,
            sampling_from_proto(message.sampling),
            message.allow_degraded,
            message.stream_text,
        )

    def _policy(
        self, message: orchestrator_pb2.GenerateSolutionRequest
    ) -> Policy | RouterThreshold:
        name = message.WhichOneof("policy")
        if name not in self.policies:
            raise PolicyUnknown(
                "policy",
                name or "nothing",
                "must be a policy that this server offers",
                f"give one of {', '.join(self.policies)}",
            )
        return _policy(message)


def _problem(message: orchestrator_pb2.GenerateSolutionRequest) -> str:
    """Returns the problem as the models see it.

    A chat's messages are joined by an empty line, oldest first, without a word about who wrote
    them: the shipped models are no chat models. A chat template is the model's own matter.
    """
    if message.WhichOneof("input") != "chat":
        return message.problem
    messages = message.chat.messages
    if len(messages) > _MOST_MESSAGES:
        raise FieldInvalid(
            "chat.messages",
            f"{len(messages)} messages",
            f"must be at most {_MOST_MESSAGES}",
            "leave out the oldest ones",
        )
    for index, turn in enumerate(messages):
        if turn.role not in _ROLES:
            raise FieldInvalid(
                f"chat.messages[{index}].role",
                turn.role,
                "is not set or unknown",
                "give CHAT_ROLE_SYSTEM, CHAT_ROLE_USER or CHAT_ROLE_ASSISTANT",
            )
    last = len(messages) - 1
    if last < 0 or messages[last].role != orchestrator_pb2.CHAT_ROLE_USER:
        raise FieldInvalid(
            "chat.messages",
            f"{last + 1} messages",
            "must end with a message of the user",
            "add the user's question as the last message",
        )
    if not messages[last].content.strip():
        raise ProblemEmpty(
            f"chat.messages[{last}].content",
            repr(messages[last].content),
            "must hold text",
            "send the question to solve",
        )
    return "\n\n".join(turn.content for turn in messages if turn.content)


def _policy(message: orchestrator_pb2.GenerateSolutionRequest) -> Policy | RouterThreshold:
    match message.WhichOneof("policy"):
        case "arbitrage":
            return _arbitrage(message.arbitrage)
        case "rsd":
            if not message.rsd.HasField("acceptance_score"):
                return RsdPolicy()
            return RsdPolicy(shortest(message.rsd.acceptance_score))
        case "oracle":
            return OraclePolicy(shortest(message.oracle.advantage_threshold))
        case "random":
            return RandomPolicy(shortest(message.random.escalation_rate), message.random.seed)
        case "draft_only":
            return DraftOnlyPolicy()
        case "target_only":
            return TargetOnlyPolicy()
        case "first_token_entropy":
            entropy = message.first_token_entropy
            threshold = shortest(entropy.entropy_threshold)
            if not entropy.HasField("token_count"):
                return FirstTokenEntropyPolicy(threshold)
            return FirstTokenEntropyPolicy(threshold, entropy.token_count)
        case other:
            raise AssertionError(f"a policy without a rule: {other}")


def _arbitrage(message: orchestrator_pb2.ArbitragePolicy) -> Policy | RouterThreshold:
    match message.WhichOneof("escalation"):
        case "escalation_threshold":
            return ArbitragePolicy(shortest(message.escalation_threshold))
        case "target_share":
            share = shortest(message.target_share)
            if not 0.0 <= share <= 1.0:
                raise ThresholdOutOfRange(
                    "arbitrage.target_share",
                    share,
                    "must be between 0 and 1",
                    "give the share of steps the target may write",
                )
            return RouterThreshold(share)
        case _:
            return RouterThreshold(None)


def _budgets(message: orchestrator_pb2.Budgets, defaults: Budgets) -> Budgets:
    def count(name: str, default: int) -> int:
        return int(getattr(message, name)) if message.HasField(name) else default

    return Budgets(
        max_steps=count("max_steps", defaults.max_steps),
        max_tokens=count("max_tokens", defaults.max_tokens),
        max_step_tokens=count("max_step_tokens", defaults.max_step_tokens),
        max_target_steps=(
            message.max_target_steps
            if message.HasField("max_target_steps")
            else defaults.max_target_steps
        ),
        time_limit_s=(
            duration_from_proto(message.time_limit)
            if message.HasField("time_limit")
            else defaults.time_limit_s
        ),
    )
