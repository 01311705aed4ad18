"""What people and programs get to see of a solution, and what a demo adds it up to."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from arbitrage.calls import solution_of
from arbitrage.core.events import Event, StepCommitted, TokenDelta
from arbitrage.core.steps import Degradation, Source
from arbitrage.wire import event_from_proto
from services.cli.demo import labelled_policies
from services.cli.failures import BadInput
from services.cli.problems import is_solved
from services.cli.render import StepLines, event_as_json
from services.cli.summary import PolicyRun, PolicySummary
from tests.services.scripted_orchestrator import SOLUTION

EVENTS: tuple[Event, ...] = tuple(event_from_proto(message) for message in SOLUTION)


def lines_of(*events: Event) -> list[str]:
    step_lines = StepLines()
    return [line.plain for event in events for line in step_lines.lines(event)]


def test_each_step_is_one_line_with_number_writer_score_time_and_text() -> None:
    words = lines_of(*EVENTS)[0].split()
    assert words[:6] == ["1", "draft", "ŷ", "0.25", "24", "ms"]
    assert words[6:] == ["14", "+", "8", "=", "22."]


def test_a_rejected_draft_is_shown_above_the_step_that_replaced_it() -> None:
    rejected, target = lines_of(*EVENTS)[1:3]
    assert "rejected  ŷ 0.75" in rejected
    assert rejected.endswith("The answer is 21.")
    assert target.split()[:2] == ["2", "target"]
    assert target.endswith("The answer is \\boxed{22}.")


def test_a_degraded_step_says_what_it_went_without() -> None:
    committed = EVENTS[1]
    assert isinstance(committed, StepCommitted)
    degraded = replace(committed, degradations=(Degradation.TARGET_UNAVAILABLE,))
    assert lines_of(degraded)[0].endswith("[target_unavailable]")


def test_the_last_line_adds_up_steps_tokens_and_time() -> None:
    said = lines_of(*EVENTS)[-1]
    assert "2 steps, 1 of 2 drafts escalated (50%)" in said
    assert "12 tokens kept, 5 thrown away, 0.12 s" in said


def test_every_event_is_one_line_of_json_with_its_kind() -> None:
    delta = TokenDelta(0, Source.DRAFT, "14")
    lines = [event_as_json(event) for event in (delta, *EVENTS)]
    told = [json.loads(line) for line in lines]
    assert not any("\n" in line for line in lines)
    assert [row["event"] for row in told] == [
        "token_delta",
        "draft_proposed",
        "step_committed",
        "draft_proposed",
        "step_committed",
        "finished",
    ]
    assert told[2]["router_score"] == 0.25
    assert told[2]["draft_score"] is None
    assert told[4]["escalated"]
    assert told[5]["ledger"]["draft"]["discarded"] == 5


def test_a_summary_adds_up_its_runs() -> None:
    solution = solution_of(EVENTS)
    runs = (PolicyRun(True, 0.1, solution), PolicyRun(False, 0.3, solution))
    told = PolicySummary("arbitrage", (*runs, PolicyRun(True, 0.5, solution))).as_dict()
    assert told["n"] == 3
    assert told["solved"] == 2
    assert told["mean_latency_s"] == pytest.approx(0.3)
    assert told["p50_latency_s"] == pytest.approx(0.3)
    assert told["escalation_rate"] == told["target_share"] == 0.5
    assert told["target_calls"] == told["escalations"] == 3


@pytest.mark.parametrize(
    ("text", "solved"),
    [
        ("The answer is \\boxed{22}.", True),
        ("The answer is \\boxed{ 22 }.", True),
        ("First \\boxed{21}.\n\nNo: \\boxed{22}.", True),
        ("First \\boxed{22}.\n\nNo: \\boxed{21}.", False),
        ("The answer is 22.", False),
        ("", False),
    ],
)
def test_the_last_boxed_value_is_the_answer(text: str, solved: bool) -> None:
    assert is_solved(text, "22") is solved


def test_a_list_of_policies_keeps_names_and_thresholds() -> None:
    policies = labelled_policies("draft_only, random:0.3")
    assert [entry.label for entry in policies] == ["draft_only", "random:0.3"]


@pytest.mark.parametrize("listed", ["draft_only,draft_only", "rsd:much"])
def test_a_list_of_policies_that_cannot_be_is_refused(listed: str) -> None:
    with pytest.raises(BadInput, match="--policies"):
        labelled_policies(listed)
