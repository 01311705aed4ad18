"""A request as a caller writes it, and the message it becomes. Pure: no transport, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from arbitrage.core.errors import BudgetOutOfRange, SamplingOutOfRange
from arbitrage.core.steps import GREEDY, Sampling
from arbitrage.fields import (
    INT32,
    UINT32,
    UINT64,
    duration_field,
    integer_field,
    real_field,
    text_field,
)
from arbitrage.policy_specs import PolicySpec
from arbitrage.v1 import orchestrator_pb2, trajectory_pb2


class ChatRole(Enum):
    """Who wrote a chat message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a chat."""

    role: ChatRole
    content: str


Problem = str | Sequence[ChatMessage]


@dataclass(frozen=True, slots=True)
class BudgetSpec:
    """Bounds of one request. What is None takes the server's default."""

    max_steps: int | None = None
    max_tokens: int | None = None
    max_step_tokens: int | None = None
    max_target_steps: int | None = None
    time_limit_s: float | None = None

    def to_proto(self) -> orchestrator_pb2.Budgets:
        """Returns the message.

        Raises:
            BudgetOutOfRange: a number the message cannot hold.
        """

        def count(name: str, value: int | None) -> int | None:
            field = f"budgets.{name}"
            return None if value is None else integer_field(BudgetOutOfRange, field, value, INT32)

        message = orchestrator_pb2.Budgets(
            max_steps=count("max_steps", self.max_steps),
            max_tokens=count("max_tokens", self.max_tokens),
            max_step_tokens=count("max_step_tokens", self.max_step_tokens),
            max_target_steps=count("max_target_steps", self.max_target_steps),
        )
        if self.time_limit_s is not None:
            message.time_limit.CopyFrom(duration_field("budgets.time_limit", self.time_limit_s))
        return message


def build_request(
    problem: Problem,
    policy: PolicySpec,
    *,
    budgets: BudgetSpec = BudgetSpec(),
    sampling: Sampling = GREEDY,
    allow_degraded: bool = False,
    stream_text: bool = False,
    request_id: str | None = None,
) -> orchestrator_pb2.GenerateSolutionRequest:
    """Returns the message that asks for a solution.

    Raises:
        InvalidRequest: a field holds what the message cannot.
    """
    request = orchestrator_pb2.GenerateSolutionRequest(
        sampling=_sampling(sampling),
        budgets=budgets.to_proto(),
        allow_degraded=allow_degraded,
        stream_text=stream_text,
        request_id=None if request_id is None else text_field("request_id", request_id),
    )
    getattr(request, policy.name).CopyFrom(policy.to_proto())
    if isinstance(problem, str):
        request.problem = text_field("problem", problem)
    else:
        # Set even when empty, so that the server sees a chat without messages, not no input.
        request.chat.SetInParent()
        for index, message in enumerate(problem):
            request.chat.messages.add(
                role=orchestrator_pb2.ChatRole.Value(f"CHAT_ROLE_{message.role.name}"),
                content=text_field(f"chat.messages[{index}].content", message.content),
            )
    return request


def _sampling(sampling: Sampling) -> trajectory_pb2.SamplingConfig:
    seed = sampling.seed
    return trajectory_pb2.SamplingConfig(
        temperature=real_field("sampling.temperature", sampling.temperature),
        top_p=real_field("sampling.top_p", sampling.top_p),
        top_k=integer_field(SamplingOutOfRange, "sampling.top_k", sampling.top_k, UINT32),
        seed=None
        if seed is None
        else integer_field(SamplingOutOfRange, "sampling.seed", seed, UINT64),
    )
