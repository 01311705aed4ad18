"""What programs write of themselves: log lines of either format, and spans when they end."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from contextvars import copy_context
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from arbitrage.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from services.generator.servicer import GeneratorServicer
from services.rpc.log_context import bind, fit
from services.rpc.logs import JsonFormatter, TextFormatter
from tests.services.collectors import collecting
from tests.services.fakes_engines import FakeGeneratorEngine
from tests.services.running import GENERATOR, House, asking, serving, solution
from tests.services.test_servicer_processes import ROOT, ended, ready, started

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = ("traceparent", f"00-{TRACE_ID}-b7ad6b7169203331-01")
ODD_ID = 'a\n{"level": "ERROR"}\r\x1b[31m' + 10_000 * "é"


def record_of(message: str, **extra: Any) -> logging.LogRecord:
    """Returns a record as a logger makes it."""
    return logging.getLogger("a.b").makeRecord(
        "a.b", logging.WARNING, __file__, 1, message, (), extra.pop("exc_info", None), extra=extra
    )


def line_of(formatter: logging.Formatter, record: logging.LogRecord, **known: str) -> str:
    """Returns a record's line in a call of which something is known."""

    def write() -> str:
        bind(**known)
        return formatter.format(record)

    return copy_context().run(write)


def asked_with(request_id: str | None, **fields: Any) -> orchestrator_pb2.GenerateSolutionRequest:
    """Returns a request with an id."""
    request = asking(**fields)
    if request_id is not None:
        request.request_id = request_id
    return request


def test_a_json_line_is_one_line_whatever_it_says() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = record_of('"a"\nb\u2028c', exc_info=sys.exc_info(), fields={"steps": 3})
    formatter = JsonFormatter("orchestrator")
    written = line_of(formatter, record, request_id=ODD_ID, tenant="team-a")
    assert written.isascii()
    assert len(written.splitlines()) == 1
    line = json.loads(written)
    assert datetime.fromisoformat(line.pop("time")).utcoffset() is not None
    assert "ValueError: two\nlines" in line.pop("exception")
    assert line == {
        "level": "WARNING",
        "logger": "a.b",
        "message": '"a"\nb\u2028c',
        "component": "orchestrator",
        "request_id": fit(ODD_ID),
        "tenant": "team-a",
        "steps": 3,
    }


def test_a_text_line_ends_with_what_is_known_of_the_call() -> None:
    record = record_of("solution finished", fields={"steps": 3})
    written = line_of(TextFormatter(), record, request_id="r\n1", tenant="")
    assert written.endswith(" WARNING a.b: solution finished steps=3 request_id=r?1")


def test_an_odd_id_becomes_one_short_word_and_stays_it() -> None:
    word = fit(ODD_ID)
    assert len(word) == 128
    assert word.isascii()
    assert word.isprintable()
    assert " " not in word
    assert fit(word) == word


async def test_a_finished_solution_is_one_line_without_its_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with House().open() as stub:
        request = asking()
        request.arbitrage.escalation_threshold = 0.4
        await solution(stub, request)
    (line,) = [record for record in caplog.records if record.message == "solution finished"]
    fields = line.__dict__["fields"]
    assert fields.pop("seconds") > 0
    assert fields == {
        "stop_reason": "end_of_sequence",
        "steps": 3,
        "escalations": 3,
        "degraded_steps": 0,
        "tokens": 9,
        "draft_tokens": 9,
        "target_tokens": 9,
    }
    assert "1 + 1" not in caplog.text


async def test_one_id_finds_every_line_of_a_request(tmp_path: Path) -> None:
    async with serving(GENERATOR, GeneratorServicer(FakeGeneratorEngine(), 8)) as server:
        with collecting() as collector:
            variables = {
                "ARBITRAGE_DRAFT_ADDRESS": server.address,
                "ARBITRAGE_TARGET_ADDRESS": server.address,
                "ARBITRAGE_READY_FILE": str(tmp_path / "ready.json"),
                "ARBITRAGE_LOG_FORMAT": "json",
                "ARBITRAGE_TRACING_ENDPOINT": collector.url,
            }
            async with started("services.orchestrator", **variables) as process:
                told = await ready(process, tmp_path / "ready.json")
                async with grpc.aio.insecure_channel(told["address"]) as channel:
                    stub: orchestrator_pb2_grpc.OrchestratorServiceAsyncStub
                    stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
                    metadata = (TRACEPARENT, ("x-arbitrage-request-id", "r-1"))
                    call = stub.GenerateSolution(asking(), timeout=60, metadata=metadata)
                    assert [event async for event in call][-1].HasField("finished")
                    # Whether it is taken or refused is not the question here.
                    await stub.GenerateSolution(asked_with(ODD_ID, problem=" "), timeout=60).code()
                process.terminate()
                code, written = await ended(process)
    assert code == 0, written
    lines = [json.loads(line) for line in written.splitlines()]
    assert {line["component"] for line in lines} == {"orchestrator"}
    (finished,) = [line for line in lines if line["message"] == "solution finished"]
    assert (
        finished.items()
        >= {
            "level": "INFO",
            "request_id": "r-1",
            "trace_id": TRACE_ID,
            "policy": "draft_only",
            "steps": 3,
            "stop_reason": "end_of_sequence",
        }.items()
    )
    assert [line for line in lines if line.get("request_id") == fit(ODD_ID)]
    spans = collector.of_trace(bytes.fromhex(TRACE_ID))
    assert {kept.service for kept in spans} == {"orchestrator"}
    (root,) = [kept for kept in spans if kept.span.name == "GenerateSolution"]
    assert root.span.span_id.hex() == finished["span_id"]


async def test_a_program_without_its_collector_serves_and_ends_well(tmp_path: Path) -> None:
    async with serving(GENERATOR, GeneratorServicer(FakeGeneratorEngine(), 8)) as server:
        variables = {
            "ARBITRAGE_DRAFT_ADDRESS": server.address,
            "ARBITRAGE_TARGET_ADDRESS": server.address,
            "ARBITRAGE_READY_FILE": str(tmp_path / "ready.json"),
            "ARBITRAGE_TRACING_ENDPOINT": "http://127.0.0.1:1",
        }
        async with started("services.orchestrator", **variables) as process:
            told = await ready(process, tmp_path / "ready.json")
            async with grpc.aio.insecure_channel(told["address"]) as channel:
                stub: orchestrator_pb2_grpc.OrchestratorServiceAsyncStub
                stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
                for _ in range(5):
                    await solution(stub, asking())
            process.terminate()
            code, written = await ended(process)
    assert code == 0, written
    assert written.count("solution finished") == 5
    assert written.count("takes no spans") <= 1
    assert "Traceback" not in written


async def test_a_start_that_fails_says_so_in_json() -> None:
    async with serving(GENERATOR, GeneratorServicer(FakeGeneratorEngine(), 8)) as server:
        variables = {
            "ARBITRAGE_DRAFT_ADDRESS": server.address,
            "ARBITRAGE_TARGET_ADDRESS": server.address,
            "ARBITRAGE_METRICS_PORT": str(server.port),
            "ARBITRAGE_LOG_FORMAT": "json",
        }
        async with started("services.orchestrator", **variables) as process:
            code, written = await ended(process)
    assert code == 2
    (line,) = [json.loads(line) for line in written.splitlines()]
    assert line["level"] == "ERROR"
    assert line["message"].startswith("ARBITRAGE_METRICS_PORT: cannot listen")


async def test_an_endpoint_that_is_no_url_stops_the_program() -> None:
    variables = {
        "ARBITRAGE_DRAFT_ADDRESS": "127.0.0.1:1",
        "ARBITRAGE_TARGET_ADDRESS": "127.0.0.1:1",
        "ARBITRAGE_TRACING_ENDPOINT": "collector:4317",
    }
    async with started("services.orchestrator", **variables) as process:
        code, written = await ended(process)
    assert code == 2
    assert (
        "ARBITRAGE_TRACING_ENDPOINT: expected http://host:port or https://host:port, got "
        "'collector:4317'"
    ) in written


def test_tracing_without_opentelemetry_stops_the_program_and_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "sys.modules['opentelemetry'] = None\n"
        "from services.orchestrator.__main__ import ORCHESTRATOR, main\n"
        "sys.exit(main(ORCHESTRATOR))"
    )
    variables = {
        "ARBITRAGE_DRAFT_ADDRESS": "127.0.0.1:1",
        "ARBITRAGE_TARGET_ADDRESS": "127.0.0.1:1",
        "ARBITRAGE_TRACING_ENDPOINT": "http://127.0.0.1:1",
    }
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=variables,
    )
    assert run.returncode == 2
    assert "ARBITRAGE_TRACING_ENDPOINT: is set, but OpenTelemetry is not installed" in run.stderr
    assert "install 'arbitrage[tracing]'" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_model_program_writes_json_from_its_first_line_to_its_last(tmp_path: Path) -> None:
    variables = {
        "ARBITRAGE_MODEL": "tiny",
        "ARBITRAGE_ROLE": "target",
        "ARBITRAGE_READY_FILE": str(tmp_path / "ready.json"),
        "ARBITRAGE_LOG_FORMAT": "json",
    }
    async with started("services.generator", **variables) as process:
        await ready(process, tmp_path / "ready.json")
        process.terminate()
        code, written = await ended(process)
    assert code == 0, written
    lines = [json.loads(line) for line in written.splitlines()]
    assert {line["component"] for line in lines} == {"target"}
