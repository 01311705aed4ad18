"""The command as a process: what it prints where, and its exit codes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import grpc
import pytest

from services.cli.__main__ import main
from services.rpc.api_keys import digest_of, read_keys
from tests.services.scripted_orchestrator import (
    SOLUTION,
    Refusal,
    ScriptedOrchestrator,
    Silence,
    proposed,
    serving,
)
from tests.services.test_cli_packs import manifest, write_pack

COMMAND = [sys.executable, "-m", "services.cli"]


def arbitrage(
    *arguments: str, stdin: bytes = b"", packs: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **({"ARBITRAGE_MODEL_PACKS": str(packs)} if packs else {})}
    done = subprocess.run(
        [*COMMAND, *arguments], input=stdin, capture_output=True, timeout=60, env=environ
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


@pytest.fixture
def orchestrator() -> Iterator[ScriptedOrchestrator]:
    with serving(ScriptedOrchestrator(SOLUTION)) as scripted:
        yield scripted


def assert_one_line_of_refusal(done: subprocess.CompletedProcess[str], said: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_ask_streams_plain_lines_where_there_is_no_terminal(
    orchestrator: ScriptedOrchestrator,
) -> None:
    done = arbitrage("ask", "1 + 1?", "--address", orchestrator.address)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "rejected" in done.stdout
    assert done.stdout.splitlines()[0].endswith("14 + 8 = 22.")


def test_ask_json_prints_one_event_a_line_and_nothing_else(
    orchestrator: ScriptedOrchestrator,
) -> None:
    done = arbitrage("ask", "1 + 1?", "--json", "--address", orchestrator.address)
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()] == [
        "draft_proposed",
        "step_committed",
        "draft_proposed",
        "step_committed",
        "finished",
    ]
    assert done.stderr == ""


def test_ask_sends_what_the_options_say(orchestrator: ScriptedOrchestrator) -> None:
    options = "--policy rsd --threshold 0.6 --max-steps 5 --max-target-steps 0 --time-limit 2.5"
    arbitrage("ask", "-", *options.split(), "--address", orchestrator.address, stdin=b"1 + 1?\n")
    (request,) = orchestrator.requests
    assert request.problem == "1 + 1?"
    assert request.rsd.acceptance_score == pytest.approx(0.6)
    assert request.budgets.max_steps == 5
    assert request.budgets.HasField("max_target_steps")
    assert request.budgets.time_limit.ToMilliseconds() == 2500


def test_a_refusal_by_the_server_is_one_line_with_its_reason() -> None:
    refusal = Refusal(
        grpc.StatusCode.INVALID_ARGUMENT,
        "problem: must hold text, got ''; send the question to solve",
        "PROBLEM_EMPTY",
        {"field": "problem", "value": "''", "fix": "send the question to solve"},
    )
    with serving(ScriptedOrchestrator((refusal,))) as orchestrator:
        done = arbitrage("ask", "", "--address", orchestrator.address)
    assert_one_line_of_refusal(done, "problem: must hold text")
    assert "[PROBLEM_EMPTY]" in done.stderr


def test_an_address_where_nobody_listens_fails_with_the_address() -> None:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    done = arbitrage("ask", "1 + 1?", "--address", address)
    assert done.returncode == 1
    assert address in done.stderr
    assert "[NOT_SERVING]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ask", "x", "--policy", "greedy"), "policy: is no policy"),
        (("ask", "x", "--policy", "draft_only", "--threshold", "0.5"), "means nothing to"),
        (("ask", "x", "--threshold", "0.5", "--target-share", "0.5"), "give one of the two"),
        (("ask", "x", "--threshold", "high"), "--threshold"),
        (("ask", " "), "problem: must hold text"),
        (("ask", "x", "--max-steps", str(2**31)), "budgets.max_steps: must be"),
        (("ask", "x", "--pack", "tinny"), "unknown model pack 'tinny'; known packs: "),
        (("ask", "x", "--time-limit", "nan"), "--time-limit: expected seconds above 0"),
        (("ask", "x", "--time-limit", "inf"), "got 'inf'; give a number such as 2.5"),
        (("ask", "x", "--time-limit", "-1"), "--time-limit: expected seconds above 0"),
        (("ask", "x", "--timeout", "nan"), "--timeout: expected seconds above 0"),
        (("ask", "x", "--timeout", "inf"), "--timeout: expected seconds above 0"),
        (("ask", "x", "--timeout=-inf"), "--timeout: expected seconds above 0"),
        (("demo", "--time-limit", "nan"), "--time-limit: expected seconds above 0"),
        (("demo", "--time-limit", "-0.5"), "got '-0.5'; give a number such as 2.5"),
        (("up", "--pack", "tinny"), "unknown model pack 'tinny'"),
        (("up", "--draft-port", "70000"), "expected an integer from 0 to 65535"),
        (("up", "--set", "draft.threads"), "expected NAME.SETTING=VALUE"),
        (("up", "--draft-port", "50052"), "--target-port: port 50052 is also asked for"),
        (("models", "verify", "tinny"), "unknown model pack"),
        (("demo", "--policies", "random"), "is needed by random"),
        (("fly",), "invalid choice: 'fly'"),
        ((), "required: COMMAND"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    returncode = main(arguments)
    printed = capsys.readouterr()
    done = subprocess.CompletedProcess(arguments, returncode, printed.out, printed.err)
    assert_one_line_of_refusal(done, said)


def test_input_that_is_not_utf_8_is_refused_with_the_byte() -> None:
    done = arbitrage("ask", "-", stdin=b"1 + \xff?")
    assert_one_line_of_refusal(done, "byte 0xff at 4 of standard input is not UTF-8")


def test_an_argument_that_is_not_utf_8_is_refused(orchestrator: ScriptedOrchestrator) -> None:
    done = arbitrage("ask", os.fsdecode(b"1 + \xff?"), "--address", orchestrator.address)
    assert_one_line_of_refusal(done, "problem: cannot be encoded as UTF-8")


@pytest.mark.parametrize("option", ["--orchestrator-port", "--draft-port"])
def test_a_port_that_is_taken_is_refused_with_the_option(option: str) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = arbitrage("up", "--ports", "any", option, str(port))
    assert_one_line_of_refusal(done, f"{option}: port {port} is already taken")


def test_models_list_shows_packs_and_roles(tmp_path: Path) -> None:
    write_pack(tmp_path / "little", manifest())
    done = arbitrage("models", "list", packs=tmp_path)
    assert done.returncode == 0
    assert "little" in done.stdout
    assert "causal-lm" in done.stdout
    assert str(tmp_path) in done.stdout


def test_models_verify_names_every_damaged_file(tmp_path: Path) -> None:
    folder = write_pack(tmp_path / "little", manifest())
    assert arbitrage("models", "verify", "little", packs=tmp_path).returncode == 0
    (folder / "draft" / "model.safetensors").write_bytes(b"changed weights!!!")
    done = arbitrage("models", "verify", "little", packs=tmp_path)
    assert done.returncode == 1
    assert "draft/model.safetensors: expected sha256" in done.stderr


def test_models_verify_misses_what_was_not_fetched_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    models = {"draft": {"kind": "causal-lm", "hub": "org/name", "revision": "main"}}
    write_pack(tmp_path / "packs" / "little", manifest(models=models, files=[]))
    done = arbitrage("models", "verify", "little", packs=tmp_path / "packs")
    assert done.returncode == 1
    assert "arbitrage models pull little" in done.stderr
    assert "draft: org/name@main" in done.stderr

    # As the hub's client lays out what it fetches.
    repository = tmp_path / "hf" / "hub" / "models--org--name"
    (repository / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (repository / "snapshots" / ("a" * 40) / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    done = arbitrage("models", "verify", "little", packs=tmp_path / "packs")
    assert done.returncode == 0
    assert f"draft: org/name@main lies in {repository}" in done.stderr


def test_models_verify_names_a_hub_that_is_no_repository(tmp_path: Path) -> None:
    models = {"draft": {"kind": "causal-lm", "hub": "a/b/c", "revision": "main"}}
    write_pack(tmp_path / "little", manifest(models=models, files=[]))
    done = arbitrage("models", "verify", "little", packs=tmp_path)
    assert_one_line_of_refusal(done, "hub 'a/b/c' names no repository; write it as namespace/name")


@pytest.mark.parametrize("command", [("up", "--ports", "any"), ("ask", "x"), ("demo",)])
def test_nothing_starts_on_damaged_weights(tmp_path: Path, command: tuple[str, ...]) -> None:
    models = {
        role: {"path": "draft", "kind": "causal-lm"}
        for role in ("draft", "target", "prm", "router")
    }
    folder = write_pack(tmp_path / "little", manifest(models=models))
    (folder / "draft" / "model.safetensors").write_bytes(b"changed weights!!!")
    done = arbitrage(*command, "--pack", "little", packs=tmp_path)
    assert_one_line_of_refusal(done, "draft/model.safetensors: expected sha256")
    assert "git checkout" in done.stderr


def test_ctrl_c_ends_ask_with_130_and_cancels_the_request() -> None:
    with serving(ScriptedOrchestrator((proposed(0, "14"), Silence()))) as orchestrator:
        command = [*COMMAND, "ask", "1 + 1?", "--json", "--address", orchestrator.address]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert orchestrator.cancelled.wait(5)
    assert process.returncode == 130
    assert b"Traceback" not in errors


def test_the_command_itself_starts_without_what_only_models_need() -> None:
    program = "import sys, services.cli.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "numpy", "scipy", "matplotlib"} & set(done.stdout.split())


def test_help_and_version_are_told() -> None:
    assert arbitrage("--version").stdout.startswith("arbitrage ")
    for command in ((), ("up",), ("ask",), ("demo",), ("models", "verify")):
        done = arbitrage(*command, "--help")
        assert done.returncode == 0
        assert "usage: arbitrage" in done.stdout


def test_a_new_key_is_shown_apart_from_its_entry_which_opens_with_it(tmp_path: Path) -> None:
    done = arbitrage("keys", "new", "--tenant", "acme")
    assert done.returncode == 0
    key = done.stderr.splitlines()[0].rpartition(" ")[2]
    assert key not in done.stdout
    path = tmp_path / "keys.toml"
    path.write_text(done.stdout)
    (entry,) = read_keys(path).keys
    assert (entry.tenant, entry.sha256) == ("acme", digest_of(key))
    assert entry.id.startswith("acme-")
    again = arbitrage("keys", "new", "--tenant", "acme")
    assert again.stdout != done.stdout


def test_a_tenant_that_cannot_be_one_gets_no_key() -> None:
    assert_one_line_of_refusal(arbitrage("keys", "new", "--tenant", 'a"b'), "--tenant: expected")


def test_ask_sends_the_key_of_its_environment_and_never_in_plaintext_to_others(
    orchestrator: ScriptedOrchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARBITRAGE_API_KEY", "marker-key")
    done = arbitrage("ask", "--address", orchestrator.address, "1 + 1?")
    assert done.returncode == 0, done.stderr
    assert ("authorization", "Bearer marker-key") in orchestrator.metadata
    refused = arbitrage("ask", "--address", "orchestrator.example:50050", "1 + 1?")
    assert_one_line_of_refusal(refused, "would get the API key in plaintext")
    assert "marker-key" not in refused.stderr


def test_ask_names_a_ca_file_that_is_not_there(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere.pem")
    done = arbitrage("ask", "--address", "localhost:1", "--tls-ca", nowhere, "1 + 1?")
    assert_one_line_of_refusal(done, "tls.ca: cannot be read")
    assert_one_line_of_refusal(arbitrage("ask", "--tls", "1 + 1?"), "--tls: needs --address")


@pytest.mark.parametrize(
    "arguments",
    [
        ("models", "list", "two\nlines"),
        ("demo", "--policies", "\x1b[2J"),
        ("ask", "1 + 1?", "--policy", "x" * 10_000),
        ("up", "--host", "\ud800"),
        ("up", "--host", "n" * 300),
    ],
    ids=repr,
)
def test_an_odd_argument_is_refused_on_one_short_line(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.split("\n")[:-1]
    assert line.isprintable()
    assert len(line) < 2_100
