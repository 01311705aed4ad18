"""What an orchestrator takes, and what it says of what it does not take."""

from __future__ import annotations

import math
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from arbitrage.core.calibration import CalibrationTable
from arbitrage.core.errors import (
    BudgetOutOfRange,
    CalibrationUnavailable,
    FieldInvalid,
    InvalidRequest,
    PolicyUnknown,
    ProblemEmpty,
    ProblemTooLarge,
    SamplingOutOfRange,
    ThresholdOutOfRange,
)
from arbitrage.core.limits import Budgets, Caps
from arbitrage.core.policies import POLICIES, ArbitragePolicy, RsdPolicy
from arbitrage.core.ports import RouterDescription
from arbitrage.core.steps import ModelIdentity
from arbitrage.v1 import orchestrator_pb2 as pb
from arbitrage.v1.trajectory_pb2 import SamplingConfig
from services.orchestrator.requests import RequestRules, RouterThreshold
from tests.services.running import asking

ALL = tuple(policy.name for policy in POLICIES)
RULES = RequestRules(Caps(), Budgets(max_steps=7), ALL)
USER, SYSTEM, ASSISTANT = pb.CHAT_ROLE_USER, pb.CHAT_ROLE_SYSTEM, pb.CHAT_ROLE_ASSISTANT


def chat(*turns: tuple[Any, str]) -> pb.Chat:
    """Returns a chat of role and content."""
    return pb.Chat(messages=[pb.ChatMessage(role=role, content=text) for role, text in turns])


def arbitrage(**fields: float) -> pb.GenerateSolutionRequest:
    """Returns a request under the arbitrage policy."""
    return asking(arbitrage=pb.ArbitragePolicy(**fields))


def budget(field: str, value: int) -> pb.Budgets:
    """Returns budgets with one field set."""
    budgets = pb.Budgets()
    setattr(budgets, field, value)
    return budgets


BAD: list[tuple[pb.GenerateSolutionRequest, type[InvalidRequest], str]] = [
    (asking(problem=""), ProblemEmpty, "problem"),
    (asking(problem=" \n\t"), ProblemEmpty, "problem"),
    (asking(problem="x" * 10_000_000), ProblemTooLarge, "problem"),
    (asking(chat=chat()), FieldInvalid, "chat.messages"),
    (asking(chat=chat((SYSTEM, "be brief"))), FieldInvalid, "chat.messages"),
    (asking(chat=chat(*[(USER, "")] * 65_537)), FieldInvalid, "chat.messages"),
    (asking(chat=chat((USER, "a"), (ASSISTANT, "b"))), FieldInvalid, "chat.messages"),
    (asking(chat=chat((0, "a"), (USER, "b"))), FieldInvalid, "chat.messages[0].role"),
    (asking(chat=chat((99, "a"), (USER, "b"))), FieldInvalid, "chat.messages[0].role"),
    (asking(chat=chat((SYSTEM, "a"), (USER, " "))), ProblemEmpty, "chat.messages[1].content"),
    (pb.GenerateSolutionRequest(problem="p"), PolicyUnknown, "policy"),
    *(
        (arbitrage(**{field: value}), ThresholdOutOfRange, f"arbitrage.{field}")
        for field in ("escalation_threshold", "target_share")
        for value in (-0.01, 1.5, math.nan, math.inf)
    ),
    (asking(rsd=pb.RsdPolicy(acceptance_score=2)), ThresholdOutOfRange, "rsd.acceptance_score"),
    (
        asking(oracle=pb.OraclePolicy(advantage_threshold=-2)),
        ThresholdOutOfRange,
        "oracle.advantage_threshold",
    ),
    (
        asking(random=pb.RandomPolicy(escalation_rate=math.nan)),
        ThresholdOutOfRange,
        "random.escalation_rate",
    ),
    (
        asking(first_token_entropy=pb.FirstTokenEntropyPolicy(entropy_threshold=-1)),
        ThresholdOutOfRange,
        "first_token_entropy.entropy_threshold",
    ),
    (
        asking(first_token_entropy=pb.FirstTokenEntropyPolicy(token_count=0)),
        FieldInvalid,
        "first_token_entropy.token_count",
    ),
    *(
        (asking(budgets=budget(field, value)), BudgetOutOfRange, f"budgets.{field}")
        for field in ("max_steps", "max_tokens", "max_step_tokens")
        for value in (-1, 0, 2**31 - 1)
    ),
    (asking(budgets=pb.Budgets(max_target_steps=-1)), BudgetOutOfRange, "budgets.max_target_steps"),
    *(
        (asking(budgets=pb.Budgets(time_limit=limit)), BudgetOutOfRange, "budgets.time_limit")
        for limit in (Duration(), Duration(seconds=-3), Duration(seconds=10**9))
    ),
    (asking(sampling=SamplingConfig(temperature=-1)), SamplingOutOfRange, "sampling.temperature"),
    (asking(sampling=SamplingConfig(top_p=1.5)), SamplingOutOfRange, "sampling.top_p"),
]


@pytest.mark.parametrize(
    ("request_", "kind", "field"),
    BAD,
    ids=[f"{number}-{field}" for number, (_, _, field) in enumerate(BAD)],
)
def test_bad_input_names_its_field_and_the_fix(
    request_: pb.GenerateSolutionRequest, kind: type[InvalidRequest], field: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        RULES.asked(request_)
    assert type(raised.value) is kind
    assert raised.value.field == field
    assert raised.value.fix
    assert len(str(raised.value)) < 400


def test_a_threshold_is_told_back_as_the_caller_wrote_it() -> None:
    with pytest.raises(ThresholdOutOfRange, match=r"got 1\.2;"):
        RULES.asked(arbitrage(escalation_threshold=1.2))


def test_a_policy_whose_model_is_missing_is_not_offered() -> None:
    rules = RequestRules(Caps(), Budgets(), ("draft_only", "target_only"))
    with pytest.raises(PolicyUnknown, match="draft_only, target_only"):
        rules.asked(arbitrage())


def test_unset_fields_take_the_servers_defaults() -> None:
    asked = RULES.asked(asking(budgets=pb.Budgets(max_tokens=5), rsd=pb.RsdPolicy()))
    assert asked.budgets == Budgets(max_steps=7, max_tokens=5)
    assert asked.policy == RsdPolicy()


def test_a_target_budget_of_none_is_not_the_same_as_zero() -> None:
    asked = RULES.asked(asking(budgets=pb.Budgets(max_target_steps=0)))
    assert asked.budgets.max_target_steps == 0


@pytest.mark.parametrize("name", ALL)
def test_every_policy_can_be_asked_for(name: str) -> None:
    request = pb.GenerateSolutionRequest(problem="p")
    getattr(request, name).SetInParent()
    policy = RULES.asked(request).policy
    assert isinstance(policy, RouterThreshold) or policy.name == name


def test_a_chat_is_joined_oldest_first() -> None:
    asked = RULES.asked(asking(chat=chat((SYSTEM, "Be brief."), (USER, "1 + 1?"))))
    assert asked.problem == "Be brief.\n\n1 + 1?"


def test_a_chat_of_very_many_messages_is_refused_before_they_are_read() -> None:
    # The last one is no message at all, but nobody comes to it.
    turns = [(USER, "")] * 4_096 + [(0, "")]
    with pytest.raises(FieldInvalid, match=r"chat\.messages: must be at most 4096, got 4097"):
        RULES.asked(asking(chat=chat(*turns)))


def test_the_router_tells_the_threshold_that_the_caller_does_not() -> None:
    table = CalibrationTable((0.25, 0.5), (0.75, 0.5))
    router = RouterDescription(ModelIdentity("r", "1"), 0.35, table, True, "softmax")
    wanted = RULES.asked(arbitrage()).policy
    assert isinstance(wanted, RouterThreshold)
    assert wanted.policy(router) == ArbitragePolicy(0.35)
    wanted = RULES.asked(arbitrage(target_share=0.5)).policy
    assert isinstance(wanted, RouterThreshold)
    assert wanted.policy(router) == ArbitragePolicy(0.5)


def test_a_share_needs_a_table() -> None:
    router = RouterDescription(ModelIdentity("r", "1"), 0.35, CalibrationTable((), ()), True, "s")
    with pytest.raises(CalibrationUnavailable, match="target_share"):
        RouterThreshold(0.5).policy(router)
