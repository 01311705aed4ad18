"""What a caller says becomes the message it should, or is refused with field, value and fix."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from arbitrage.calls import Addresses
from arbitrage.client import (
    Arbitrage,
    BudgetSpec,
    ChatMessage,
    ChatRole,
    DraftOnly,
    FirstTokenEntropy,
    Oracle,
    PolicySpec,
    Random,
    Rsd,
    TargetOnly,
)
from arbitrage.core.errors import (
    BudgetOutOfRange,
    FieldInvalid,
    InvalidRequest,
    MalformedMessage,
    PolicyUnknown,
    SamplingOutOfRange,
    ThresholdOutOfRange,
)
from arbitrage.core.policies import POLICIES
from arbitrage.core.steps import Degradation, Sampling, Source, StopReason
from arbitrage.policy_specs import POLICY_NAMES, PolicyOptions, policy_named
from arbitrage.request import build_request
from arbitrage.v1 import orchestrator_pb2 as api
from arbitrage.v1 import trajectory_pb2


def test_a_problem_and_a_policy_make_a_request() -> None:
    request = build_request("1 + 1?", Arbitrage(target_share=0.3))
    assert request.problem == "1 + 1?"
    assert request.WhichOneof("policy") == "arbitrage"
    assert request.arbitrage.target_share == pytest.approx(0.3)
    assert not request.stream_text


def test_a_policy_without_fields_is_still_named_in_the_request() -> None:
    assert build_request("1 + 1?", DraftOnly()).WhichOneof("policy") == "draft_only"
    assert build_request("1 + 1?", Arbitrage()).arbitrage.WhichOneof("escalation") is None


def test_a_zero_threshold_is_sent_and_not_taken_for_unset() -> None:
    request = build_request("1 + 1?", Arbitrage(escalation_threshold=0.0))
    assert request.arbitrage.WhichOneof("escalation") == "escalation_threshold"


def test_budgets_left_out_are_left_to_the_server() -> None:
    budgets = build_request("1 + 1?", TargetOnly(), budgets=BudgetSpec(max_steps=4)).budgets
    assert budgets.max_steps == 4
    assert not budgets.HasField("max_tokens")
    assert not budgets.HasField("time_limit")


def test_a_negative_budget_reaches_the_server_which_knows_the_range() -> None:
    budgets = BudgetSpec(max_tokens=-1, time_limit_s=-0.5)
    request = build_request("1 + 1?", DraftOnly(), budgets=budgets)
    assert request.budgets.max_tokens == -1
    assert request.budgets.time_limit.ToNanoseconds() == -500_000_000


def test_a_chat_keeps_roles_and_order() -> None:
    chat = [ChatMessage(ChatRole.SYSTEM, "Be brief."), ChatMessage(ChatRole.USER, "1 + 1?")]
    messages = build_request(chat, DraftOnly()).chat.messages
    assert [(message.role, message.content) for message in messages] == [
        (api.CHAT_ROLE_SYSTEM, "Be brief."),
        (api.CHAT_ROLE_USER, "1 + 1?"),
    ]


def test_a_chat_without_messages_is_sent_as_a_chat() -> None:
    assert build_request([], DraftOnly()).WhichOneof("input") == "chat"


@pytest.mark.parametrize(
    ("build", "error", "field"),
    [
        (lambda: build_request("a\ud800b", DraftOnly()), MalformedMessage, "problem"),
        (
            lambda: build_request([ChatMessage(ChatRole.USER, "\udcff")], DraftOnly()),
            MalformedMessage,
            "chat.messages[0].content",
        ),
        (
            lambda: build_request("x", DraftOnly(), budgets=BudgetSpec(max_steps=2**31)),
            BudgetOutOfRange,
            "budgets.max_steps",
        ),
        (
            lambda: build_request("x", DraftOnly(), budgets=BudgetSpec(time_limit_s=float("inf"))),
            BudgetOutOfRange,
            "budgets.time_limit",
        ),
        (
            lambda: build_request("x", DraftOnly(), sampling=Sampling(top_k=-1)),
            SamplingOutOfRange,
            "sampling.top_k",
        ),
        (
            lambda: build_request("x", DraftOnly(), sampling=Sampling(seed=-1)),
            SamplingOutOfRange,
            "sampling.seed",
        ),
        (lambda: build_request("x", Random(0.5, seed=-1)), FieldInvalid, "random.seed"),
        (
            lambda: build_request("x", FirstTokenEntropy(0.5, token_count=-1)),
            FieldInvalid,
            "first_token_entropy.token_count",
        ),
        (lambda: Arbitrage(0.5, target_share=0.3), FieldInvalid, "arbitrage.target_share"),
    ],
)
def test_what_no_message_can_hold_is_refused_with_its_field(
    build: Callable[[], object], error: type[InvalidRequest], field: str
) -> None:
    with pytest.raises(error) as caught:
        build()
    assert caught.value.field == field
    assert caught.value.fix in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("arbitrage", PolicyOptions(), Arbitrage()),
        ("arbitrage", PolicyOptions(threshold=0.4), Arbitrage(escalation_threshold=0.4)),
        ("arbitrage", PolicyOptions(target_share=0.3), Arbitrage(target_share=0.3)),
        (
            "arbitrage",
            PolicyOptions(threshold=0.4, max_threshold=0.6),
            Arbitrage(escalation_threshold=0.4, max_escalation_threshold=0.6),
        ),
        ("rsd", PolicyOptions(threshold=0.6), Rsd(0.6)),
        ("oracle", PolicyOptions(), Oracle(0.0)),
        ("random", PolicyOptions(threshold=0.3, seed=7), Random(0.3, 7)),
        ("draft_only", PolicyOptions(), DraftOnly()),
        ("target_only", PolicyOptions(), TargetOnly()),
        (
            "first_token_entropy",
            PolicyOptions(threshold=0.5, token_count=2),
            FirstTokenEntropy(0.5, 2),
        ),
    ],
)
def test_a_name_and_its_options_make_a_policy(
    name: str, options: PolicyOptions, expected: PolicySpec
) -> None:
    assert policy_named(name, options) == expected


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("draft_only", PolicyOptions(threshold=0.5), "threshold"),
        ("target_only", PolicyOptions(target_share=0.5), "target_share"),
        ("rsd", PolicyOptions(target_share=0.5), "target_share"),
        ("rsd", PolicyOptions(max_threshold=0.5), "max_threshold"),
        ("arbitrage", PolicyOptions(seed=1), "seed"),
        ("oracle", PolicyOptions(token_count=1), "token_count"),
        ("random", PolicyOptions(), "threshold"),
        ("first_token_entropy", PolicyOptions(), "threshold"),
        ("arbitrage", PolicyOptions(threshold=0.5, target_share=0.5), "arbitrage.target_share"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(
    name: str, options: PolicyOptions, field: str
) -> None:
    with pytest.raises(FieldInvalid) as caught:
        policy_named(name, options)
    assert caught.value.field == field


def test_a_threshold_that_would_rise_downwards_is_refused() -> None:
    with pytest.raises(ThresholdOutOfRange, match=r"escalation_threshold, 0\.5") as caught:
        Arbitrage(escalation_threshold=0.5, max_escalation_threshold=0.4)
    assert caught.value.field == "arbitrage.max_escalation_threshold"


def test_what_the_threshold_may_rise_to_is_sent_only_if_given() -> None:
    assert Arbitrage(max_escalation_threshold=0.5).to_proto().max_escalation_threshold == 0.5
    assert not Arbitrage().to_proto().HasField("max_escalation_threshold")


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PolicyUnknown, match="arbitrage, rsd, oracle"):
        policy_named("greedy")


@pytest.mark.parametrize(
    "address", ["", "a", "a:99999", "http://a:1", "a:1,b:0", "https://a", "a:1/", "dns"]
)
def test_an_address_that_is_none_is_refused_before_any_call(address: str) -> None:
    with pytest.raises(FieldInvalid, match=r"^address: .*give host:port"):
        Addresses(address)


def test_hosts_ip_addresses_and_names_of_grpc_are_addresses() -> None:
    named = ["a:1", "[::1]:50050", "unix:/run/a.sock", "dns:///a.svc:50050", "xds:///a"]
    assert Addresses(named).all == tuple(named)


def test_client_and_core_know_the_same_policies() -> None:
    assert set(POLICY_NAMES) == {policy.name for policy in POLICIES}


@pytest.mark.parametrize(
    ("kind", "names", "prefix"),
    [
        (Source, trajectory_pb2.Source.keys(), "SOURCE_"),
        (StopReason, trajectory_pb2.StopReason.keys(), "STOP_REASON_"),
        (Degradation, api.Degradation.keys(), "DEGRADATION_"),
        (ChatRole, api.ChatRole.keys(), "CHAT_ROLE_"),
    ],
)
def test_an_enum_has_the_same_names_on_the_wire(
    kind: type[Source], names: list[str], prefix: str
) -> None:
    on_the_wire = {name.removeprefix(prefix) for name in names} - {"UNSPECIFIED"}
    assert {member.name for member in kind} == on_the_wire
