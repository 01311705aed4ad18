"""Feedback: a share of routed steps is observed, and no request notices."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from arbitrage.core.calibration import CalibrationTable
from arbitrage.core.errors import TargetUnavailable
from arbitrage.core.ports import RouterDescription
from arbitrage.core.steps import ModelIdentity, Score
from arbitrage.v1 import feedback_pb2
from arbitrage.v1 import orchestrator_pb2 as pb
from services.orchestrator.feedback import FeedbackRules
from services.orchestrator.settings import OrchestratorSettings
from services.orchestrator.telemetry import FeedbackMetrics
from services.rpc.feedback_log import FeedbackLog, read_feedback
from services.rpc.settings import SettingsError, read_settings
from tests.services.running import House, asking, committed, solution, until

ARBITRAGE = pb.ArbitragePolicy()
RECORDS = "arbitrage_feedback_records_total"


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(
        settings={
            "feedback_sample_rate": 1.0,
            "feedback_folder": tmp_path / "feedback",
            "feedback_max_inflight": 64,
            "feedback_max_target_inflight": 64,
        }
    )


async def records(house: House, tmp_path: Path, count: int) -> list[feedback_pb2.ObservedStep]:
    """Returns the records once so many were written."""
    await until(lambda: house.metric(RECORDS, result="written") == count)
    return await asyncio.to_thread(lambda: list(read_feedback(tmp_path / "feedback")))


async def test_an_accepted_step_is_written_by_the_target_too_and_both_are_scored(
    house: House, tmp_path: Path
) -> None:
    house.router.score, house.prm.score = 0.3, 0.8
    async with house.open() as stub:
        events = await solution(stub, asking(arbitrage=ARBITRAGE))
        found = await records(house, tmp_path, 3)
        assert house.target.call_count == 3
        assert house.metric("arbitrage_tokens_total", role="target", outcome="shadow") == 9
        assert house.metric("arbitrage_tokens_total", role="target", outcome="kept") == 0
    assert events[-1].finished.ledger.target.call_count == 0
    second = next(record for record in found if len(record.steps) == 1)
    assert second.problem == "1 + 1?"
    assert (second.draft_step.text, second.target_steps[0].text) == ("draft 1", "target 1")
    assert second.draft_score == pytest.approx(0.8)
    assert list(second.target_scores) == pytest.approx([0.8])
    assert (second.router_score, second.threshold) == pytest.approx((0.3, 0.4))
    assert (second.router.model_id, second.prm.model_id) == ("router", "prm")
    assert (second.escalated, second.propensity) == (False, 1.0)
    assert second.steps[0].text == committed(events)[0].step.text


async def test_an_escalated_step_needs_no_further_call_of_the_target(
    house: House, tmp_path: Path
) -> None:
    house.router.score = 0.9
    async with house.open() as stub:
        await solution(stub, asking(arbitrage=ARBITRAGE))
        found = await records(house, tmp_path, 3)
        assert house.target.call_count == 3
        assert house.metric("arbitrage_tokens_total", role="target", outcome="shadow") == 0
    assert all(record.escalated for record in found)
    assert {record.draft_step.text for record in found} == {"draft 0", "draft 1", "draft 2"}


async def test_a_request_is_the_same_with_and_without_feedback(house: House) -> None:
    async def solved(house: House) -> list[pb.StepCommitted]:
        async with house.open() as stub:
            steps = committed(await solution(stub, asking(arbitrage=ARBITRAGE)))
        for step in steps:
            for times in ("draft_time", "decision_time", "target_time", "elapsed"):
                step.ClearField(times)
        return steps

    house.router.score = 0.3
    without = House()
    without.router.score = 0.3
    assert await solved(house) == await solved(without)
    assert without.target.call_count == 0


async def test_other_policies_are_not_observed(house: House) -> None:
    async with house.open() as stub:
        await solution(stub, asking(rsd=pb.RsdPolicy()))
        await solution(stub, asking())
        await solution(stub, asking(target_only=pb.TargetOnlyPolicy()))
        assert house.metric(RECORDS, result="written") == 0
        assert house.metric(RECORDS, result="no_room") == 0


async def test_a_target_that_hangs_in_the_background_holds_up_nobody(house: House) -> None:
    house.router.score = 0.3
    house.target.may_answer.clear()
    house.settings["feedback_max_inflight"] = 1
    async with house.open() as stub:
        events = await solution(stub, asking(arbitrage=ARBITRAGE))
        assert len(committed(events)) == 3
        # The first observation waits for the target; the other steps find no room.
        assert house.metric(RECORDS, result="no_room") == 2
        assert house.metric("arbitrage_target_inflight_steps") == 0
        house.target.may_answer.set()


async def test_nothing_is_observed_while_the_target_is_busy(house: House) -> None:
    house.settings["feedback_max_target_inflight"] = 1
    async with house.open() as stub:
        house.target.may_answer.clear()
        busy = asyncio.ensure_future(solution(stub, asking(target_only=pb.TargetOnlyPolicy())))
        await until(lambda: house.metric("arbitrage_target_inflight_steps") == 1)
        house.router.score = 0.3
        await solution(stub, asking(problem="2 + 2?", arbitrage=ARBITRAGE))
        assert house.metric(RECORDS, result="no_room") == 3
        house.target.may_answer.set()
        await busy


async def test_a_failure_in_the_background_is_counted_and_nothing_else(
    house: House, tmp_path: Path
) -> None:
    house.router.score = 0.3
    house.target.error = TargetUnavailable("gone")
    async with house.open() as stub:
        assert len(committed(await solution(stub, asking(arbitrage=ARBITRAGE)))) == 3
        await until(lambda: house.metric(RECORDS, result="failed") == 3)


async def test_a_sink_that_cannot_be_written_is_counted(house: House, tmp_path: Path) -> None:
    await asyncio.to_thread((tmp_path / "feedback").write_text, "a file")
    house.router.score = 0.3
    async with house.open() as stub:
        assert len(committed(await solution(stub, asking(arbitrage=ARBITRAGE)))) == 3
        await until(lambda: house.metric(RECORDS, result="failed") == 3)


def test_the_share_of_observed_steps_is_the_rate_and_the_seed_decides_which() -> None:
    rules = FeedbackRules(0.05, seed=1)
    chosen = [(r, s) for r in range(2000) for s in range(5) if rules.chooses(str(r), s)]
    assert len(chosen) == pytest.approx(500, rel=0.2)
    assert all(rules.chooses(str(r), s) for r, s in chosen)
    other = FeedbackRules(0.05, seed=2)
    assert sum(other.chooses(str(r), s) for r, s in chosen) < 100


@pytest.mark.parametrize("missing", ["FEEDBACK_FOLDER", "PRM_ADDRESS", "ROUTER_ADDRESS"])
def test_feedback_without_what_it_needs_is_refused_at_the_start(missing: str) -> None:
    environ = {
        "ARBITRAGE_DRAFT_ADDRESS": "a:1",
        "ARBITRAGE_TARGET_ADDRESS": "a:2",
        "ARBITRAGE_PRM_ADDRESS": "a:3",
        "ARBITRAGE_ROUTER_ADDRESS": "a:4",
        "ARBITRAGE_FEEDBACK_FOLDER": "/feedback",
        "ARBITRAGE_FEEDBACK_SAMPLE_RATE": "0.01",
    }
    assert read_settings(OrchestratorSettings, environ).feedback_rules.rate == 0.01
    del environ[f"ARBITRAGE_{missing}"]
    with pytest.raises(SettingsError, match=f"ARBITRAGE_{missing}: is not set"):
        read_settings(OrchestratorSettings, environ)
    # Without a folder, a Redis will do.
    environ["ARBITRAGE_STORE_URL"] = "redis://127.0.0.1:1"
    if missing == "FEEDBACK_FOLDER":
        assert read_settings(OrchestratorSettings, environ).feedback_rules.rate == 0.01
    else:
        with pytest.raises(SettingsError, match=f"ARBITRAGE_{missing}: is not set"):
            read_settings(OrchestratorSettings, environ)


def described(revision: str) -> RouterDescription:
    """Returns a router whose scores are half as sure as they look."""
    return RouterDescription(
        ModelIdentity("router", revision),
        0.5,
        CalibrationTable((), ()),
        True,
        "softmax",
        prior_logit_shift=math.log(1 / 3),
        advantage_margin=0.1,
    )


def test_drift_is_what_was_predicted_minus_what_came() -> None:
    registry = CollectorRegistry()
    metrics = FeedbackMetrics(registry, lambda count: None)

    def value(name: str) -> float | None:
        return registry.get_sample_value(f"arbitrage_{name}")

    router = described("r1")
    # A score of one half under a prior of one to three is a probability of a quarter.
    metrics.observe(Score(0.5, router.model), 0.2, router)
    assert value("feedback_predicted_advantage_total") == pytest.approx(0.25)
    assert value("feedback_observed_advantage_total") == 1
    assert value("router_drift") == pytest.approx(-0.75)
    metrics.observe(Score(0.5, router.model), 0.05, router)
    assert value("feedback_observed_advantage_total") == 1
    assert value("router_drift") == pytest.approx(-0.75 + 0.02 * (0.25 + 0.75))
    successor = described("r2")
    metrics.observe(Score(0.5, successor.model), 0.0, successor)
    assert value("router_drift") == pytest.approx(0.25)


@pytest.mark.parametrize("shift", [-1_000.0, 1_000.0])
def test_no_shift_is_too_large_to_predict_with(shift: float) -> None:
    metrics = FeedbackMetrics(CollectorRegistry(), lambda count: None)
    router = replace(described("r1"), prior_logit_shift=shift)
    metrics.observe(Score(0.5, router.model), 0.2, router)


@pytest.fixture
def log_of(tmp_path: Path) -> Callable[[int], FeedbackLog]:
    return lambda size: FeedbackLog(tmp_path, size)


def test_a_torn_last_line_is_passed_over_and_no_other(
    log_of: Callable[[int], FeedbackLog], tmp_path: Path
) -> None:
    log = log_of(64)
    for number in range(3):
        log.write(feedback_pb2.ObservedStep(problem=f"{number}?", draft_score=0.25))
    (path,) = tmp_path.glob("*.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert [record.problem for record in read_feedback(tmp_path)] == ["0?", "1?"]
    path.write_bytes(whole[20:])
    with pytest.raises(ValueError, match="line 1 is no record"):
        list(read_feedback(tmp_path))


def test_a_disk_that_was_full_for_a_while_tears_no_record_after_it(
    log_of: Callable[[int], FeedbackLog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = log_of(64)
    log.write(feedback_pb2.ObservedStep(problem="0?"))

    def refuse(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="No space"):
            log.write(feedback_pb2.ObservedStep(problem="1?"))
    (torn,) = tmp_path.glob("*.jsonl")
    torn.write_bytes(torn.read_bytes()[:-5])
    log.write(feedback_pb2.ObservedStep(problem="2?"))
    assert [record.problem for record in read_feedback(tmp_path)] == ["0?", "2?"]


def test_threads_that_append_at_once_write_whole_lines(
    log_of: Callable[[int], FeedbackLog], tmp_path: Path
) -> None:
    log = log_of(1)
    records = [
        feedback_pb2.ObservedStep(problem="x" * 50_000, request_id=str(n)) for n in range(60)
    ]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(log.write, records))
    read = {record.request_id for record in read_feedback(tmp_path)}
    assert read == {record.request_id for record in records}
    assert len(list(tmp_path.glob("*.jsonl"))) == 3


def test_a_file_that_has_grown_is_followed_by_another(
    log_of: Callable[[int], FeedbackLog], tmp_path: Path
) -> None:
    log = log_of(1)
    for number in range(3):
        log.write(feedback_pb2.ObservedStep(problem="x" * 600_000, request_id=str(number)))
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    assert [record.request_id for record in read_feedback(tmp_path)] == ["0", "1", "2"]


def test_a_line_that_is_no_record_is_told_on_one_short_line(tmp_path: Path) -> None:
    path = tmp_path / "feedback-1.jsonl"
    path.write_text('{"sampling": {"unheard_of": "' + "x" * 9_999 + '"}}\n')
    with pytest.raises(ValueError, match="line 1 is no record") as raised:
        list(read_feedback(tmp_path))
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 700
