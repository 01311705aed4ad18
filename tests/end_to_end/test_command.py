"""The whole thing: six real services, the shipped models, and the command a person types."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from arbitrage.client import ArbitrageClient, Random
from arbitrage.core.events import DraftProposed, Finished, StepCommitted
from arbitrage.core.steps import Source, StopReason
from services.engines.packs import find_pack
from tests.end_to_end.deployment import COMMAND, PROBLEM, running_up, wait_for_exit

# Starting takes seconds on idle cores and a minute on busy ones.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=250)


def assert_ledger_adds_up(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["event"] == "finished"
    steps = [event for event in events if event["event"] == "step_committed"]
    kept = sum(step["token_count"] for step in steps)
    ledger = events[-1]["ledger"]
    assert ledger["draft"]["kept"] + ledger["target"]["kept"] == kept
    assert ledger["target"]["calls"] == sum(step["escalated"] for step in steps)


def test_demo_json_prints_one_object_whose_figures_agree() -> None:
    done = run("demo", "--json", "--problems", "3")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    policies = told["policies"]
    assert set(policies) == {"draft_only", "target_only", "arbitrage"}
    for figures in policies.values():
        assert figures["n"] == 3
        assert 0 <= figures["solved"] <= 3
        assert figures["mean_latency_s"] > 0
        assert figures["p50_latency_s"] > 0
        ledger = figures["ledger"]
        assert ledger["draft"]["kept"] + ledger["target"]["kept"] > 0
    draft, target, routed = (policies[name] for name in ("draft_only", "target_only", "arbitrage"))
    assert draft["target_calls"] == draft["escalations"] == 0
    assert draft["ledger"]["draft"]["discarded"] == 0
    assert target["ledger"]["draft"]["calls"] == 0
    assert target["target_calls"] == target["steps"]
    assert routed["target_calls"] == routed["escalations"]
    assert routed["ledger"]["router"]["calls"] == routed["ledger"]["draft"]["calls"]
    assert 0 < told["first_step_s"] < told["elapsed_s"]


def test_up_answers_ask_and_on_sigterm_lets_the_running_request_end(
    tmp_path: Path,
) -> None:
    with running_up(tmp_path) as up, ArbitrageClient(up.address) as client:
        assert_ledger_adds_up(run("ask", PROBLEM, "--json", "--address", up.address))
        with OpenAI(base_url=f"http://{up.addresses['gateway']}/v1", api_key="none") as openai:
            messages: Any = [{"role": "user", "content": PROBLEM}]
            chunks = openai.chat.completions.create(
                model="arbitrage", messages=messages, stream=True
            )
            parts = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(parts) == client.solve(PROBLEM).text

        # Every draft is thrown away, and whoever is to write instead stands still: the request
        # cannot end before the orchestrator has been told to stop.
        up.services["target"].suspend()
        stream = client.stream(PROBLEM, policy=Random(1.0))
        events = [next(stream)]
        up.process.send_signal(signal.SIGTERM)
        up.wait_for_log("orchestrator", "signal SIGTERM: stopping")
        up.services["target"].resume()
        events += stream
        returncode, _ = wait_for_exit(up.process)
        assert isinstance(events[0], DraftProposed)
        assert isinstance(events[-1], Finished)
        assert events[-1].stop_reason is StopReason.END_OF_SEQUENCE
        steps = [event for event in events if isinstance(event, StepCommitted)]
        assert {event.step.source for event in steps} == {Source.TARGET}
        assert returncode == 0
        assert up.orphans_after(0) == []


def test_up_serves_a_pack_without_prm_and_router(tmp_path: Path) -> None:
    pack = tmp_path / "pair"
    shutil.copytree(find_pack("tiny").folder, pack)
    manifest = json.loads((pack / "pack.json").read_text())
    manifest["models"] = {role: manifest["models"][role] for role in ("draft", "target")}
    (pack / "pack.json").write_text(json.dumps({**manifest, "name": "pair"}))
    with running_up(tmp_path / "run", "--pack", str(pack), count=4) as up:
        asked = run("ask", PROBLEM, "--json", "--policy", "draft_only", "--address", up.address)
        assert_ledger_adds_up(asked)


def test_ctrl_c_stops_every_service_and_exits_130(tmp_path: Path) -> None:
    with running_up(tmp_path) as up:
        up.process.send_signal(signal.SIGINT)
        returncode, errors = wait_for_exit(up.process)
        assert returncode == 130
        assert "Traceback" not in errors
        assert up.orphans_after(0) == []


def test_the_death_of_one_service_stops_the_rest_and_shows_its_log(tmp_path: Path) -> None:
    with running_up(tmp_path) as up:
        up.services["prm"].kill()
        returncode, errors = wait_for_exit(up.process)
        assert returncode == 1
        assert "prm ended while it was needed (signal 9)" in errors
        last_line = (tmp_path / "prm.log").read_text().splitlines()[-1]
        assert last_line in errors
        assert up.orphans_after(0) == []


def test_no_service_outlives_an_up_that_is_killed(tmp_path: Path) -> None:
    with running_up(tmp_path) as up:
        up.process.kill()
        assert up.orphans_after(5) == []


def test_up_with_an_embedded_redis_takes_requests_that_can_be_resumed(tmp_path: Path) -> None:
    with (
        running_up(tmp_path, "--redis", "embedded") as up,
        ArbitrageClient(up.address) as client,
    ):
        assert client.capabilities().resumable
        first = client.solve(PROBLEM, request_id="id-1")
        again = client.solve(PROBLEM, request_id="id-1")
        # Told again, to the time that each step took.
        assert again.steps == first.steps
        up.process.send_signal(signal.SIGTERM)
        returncode, errors = wait_for_exit(up.process)
    assert returncode == 0, errors
    # The socket went with the server.
    assert not (tmp_path / "redis" / "redis.sock").exists()
