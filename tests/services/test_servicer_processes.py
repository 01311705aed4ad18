"""Services as processes: how they start, what stops them from starting, and how they end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from arbitrage.v1 import (
    orchestrator_pb2_grpc,
    prm_pb2,
    prm_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
)
from services.generator.servicer import GeneratorServicer
from services.rpc.pool import opened_pool
from tests.services.fakes_engines import FakeGeneratorEngine
from tests.services.redis_servers import free_port
from tests.services.running import (
    GENERATOR,
    ORCHESTRATOR,
    PRM,
    ROUTER,
    asking,
    http_answer,
    serving,
)

ROOT = Path(__file__).resolve().parents[2]
PROBLEM = "Ann owns 14. Bob has 8 more than Ann. How many pens does Bob have?"
# Importing torch takes a minute where many processes share a core.
START_TIMEOUT_S = 180.0


@asynccontextmanager
async def started(module: str, **variables: str) -> AsyncIterator[Process]:
    """Starts a service, and kills it where the test did not end it."""
    environ = {name: value for name, value in os.environ.items() if "ARBITRAGE" not in name}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        cwd=ROOT,
        stderr=PIPE,
        env={**environ, "ARBITRAGE_PORT": "0", "ARBITRAGE_METRICS_PORT": "0", **variables},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def ended(process: Process) -> tuple[int | None, str]:
    """Waits for a process's end and returns its exit code and what it wrote."""
    _, written = await asyncio.wait_for(process.communicate(), START_TIMEOUT_S)
    return process.returncode, written.decode()


async def ready(process: Process, path: Path) -> dict[str, Any]:
    """Waits for the file a service writes once it serves, and returns what is in it."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while not path.exists():  # noqa: ASYNC240 - a test may look at a file
            assert process.returncode is None, (await ended(process))[1]
            await asyncio.sleep(0.05)
    found: dict[str, Any] = json.loads(path.read_bytes())  # noqa: ASYNC240 - as above
    return found


async def serves(address: str, service: str) -> None:
    """Returns once a service says that it serves."""
    async with opened_pool("prm", address) as pool:
        await pool.wait_until_serving(service)


async def test_a_bad_setting_stops_the_program_with_one_line() -> None:
    async with started("services.orchestrator", ARBITRAGE_DRAFT_ADDRES="x:1") as process:
        code, written = await ended(process)
    assert code == 2
    assert "ARBITRAGE_DRAFT_ADDRES: no such setting; did you mean ARBITRAGE_DRAFT_ADDRESS?" in (
        written
    )
    assert "Traceback" not in written


@pytest.mark.parametrize("setting", ["ARBITRAGE_PORT", "ARBITRAGE_METRICS_PORT"])
async def test_a_taken_port_stops_the_program_and_is_named(setting: str) -> None:
    async with serving(GENERATOR, GeneratorServicer(FakeGeneratorEngine(), 8)) as server:
        variables = {
            "ARBITRAGE_DRAFT_ADDRESS": server.address,
            "ARBITRAGE_TARGET_ADDRESS": server.address,
            setting: str(server.port),
        }
        async with started("services.orchestrator", **variables) as process:
            code, written = await ended(process)
    assert code == 2
    assert f"{setting}: cannot listen on 127.0.0.1:{server.port}" in written
    assert "Traceback" not in written


async def test_a_host_where_nobody_can_listen_is_blamed_and_not_the_port() -> None:
    nobody = {"ARBITRAGE_DRAFT_ADDRESS": "127.0.0.1:1", "ARBITRAGE_TARGET_ADDRESS": "127.0.0.1:1"}
    # An address of the block that is kept for documentation: no machine has it.
    async with started("services.orchestrator", ARBITRAGE_HOST="192.0.2.1", **nobody) as process:
        code, written = await ended(process)
    assert code == 2
    assert "ARBITRAGE_HOST: 192.0.2.1: nobody can listen there" in written
    assert "Traceback" not in written


async def test_a_ready_file_that_cannot_be_written_stops_the_program_and_is_named(
    tmp_path: Path,
) -> None:
    path = tmp_path / "nowhere" / "ready.json"
    async with serving(GENERATOR, GeneratorServicer(FakeGeneratorEngine(), 8)) as server:
        variables = {
            "ARBITRAGE_DRAFT_ADDRESS": server.address,
            "ARBITRAGE_TARGET_ADDRESS": server.address,
            "ARBITRAGE_READY_FILE": str(path),
        }
        async with started("services.orchestrator", **variables) as process:
            code, written = await ended(process)
    assert code == 2
    assert f"ARBITRAGE_READY_FILE: {path}: cannot be written" in written
    assert "Traceback" not in written


async def test_a_program_that_still_waits_for_others_stops_when_told() -> None:
    nobody = {"ARBITRAGE_DRAFT_ADDRESS": "127.0.0.1:1", "ARBITRAGE_TARGET_ADDRESS": "127.0.0.1:1"}
    async with started("services.orchestrator", **nobody) as process:
        assert process.stderr is not None
        # "still waiting" is written after some seconds of asking, so the wait is under way.
        line = await asyncio.wait_for(process.stderr.readline(), START_TIMEOUT_S)
        assert b"still waiting for the" in line
        process.terminate()
        code, _ = await ended(process)
    assert code == 0


async def test_a_second_signal_ends_the_program_at_once(tmp_path: Path) -> None:
    engine = FakeGeneratorEngine()
    engine.may_answer.clear()
    async with serving(GENERATOR, GeneratorServicer(engine, 8)) as server:
        variables = {
            "ARBITRAGE_DRAFT_ADDRESS": server.address,
            "ARBITRAGE_TARGET_ADDRESS": server.address,
            "ARBITRAGE_READY_FILE": str(tmp_path / "ready.json"),
            "ARBITRAGE_SHUTDOWN_GRACE_S": "3600",
        }
        async with started("services.orchestrator", **variables) as process:
            told = await ready(process, tmp_path / "ready.json")
            assert told["pid"] == process.pid
            async with grpc.aio.insecure_channel(told["address"]) as channel:
                stub: orchestrator_pb2_grpc.OrchestratorServiceAsyncStub
                stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
                call = stub.GenerateSolution(asking(stream_text=True), timeout=60)
                await anext(aiter(call))
                assert process.stderr is not None
                process.send_signal(signal.SIGTERM)
                while b"signal SIGTERM" not in await process.stderr.readline():
                    pass
                process.send_signal(signal.SIGTERM)
                code, _ = await ended(process)
    assert code == 128 + signal.SIGTERM


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_model_that_is_not_there_stops_the_program_with_one_line() -> None:
    variables = {"ARBITRAGE_MODEL": "no-such-pack", "ARBITRAGE_ROLE": "draft"}
    async with started("services.generator", **variables) as process:
        code, written = await ended(process)
    assert code == 2
    assert "ARBITRAGE_MODEL: " in written
    assert "no-such-pack" in written
    assert "Traceback" not in written


def is_read(pipe: Path) -> bool:
    """Returns whether somebody has a named pipe open for reading, or waits for it."""
    try:
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_program_that_still_loads_its_model_stops_when_told(tmp_path: Path) -> None:
    # Weights behind two pipes: the load goes past the first and waits at the second for ever.
    (tmp_path / "config.json").write_text("{}")
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    os.mkfifo(first)
    os.mkfifo(second)
    variables = {"ARBITRAGE_MODEL": str(tmp_path), "ARBITRAGE_ROLE": "draft"}
    port = free_port()
    variables["ARBITRAGE_METRICS_PORT"] = str(port)
    async with started("services.generator", **variables) as process:
        async with asyncio.timeout(START_TIMEOUT_S):
            while not is_read(first):  # noqa: ASYNC110 - no event tells of it
                await asyncio.sleep(0.05)
        # A prober leaves it alone while it loads, and sends it no calls.
        assert (await http_answer(port, "/live")).split()[1] == b"200"
        assert (await http_answer(port, "/ready")).split()[1] == b"503"
        process.terminate()
        code, written = await asyncio.wait_for(ended(process), 30)
    assert code == 0, written
    assert "Traceback" not in written


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_judges_serve_the_shipped_models(tmp_path: Path) -> None:
    variables = {"ARBITRAGE_MODEL": "tiny"}
    files = {name: tmp_path / f"{name}.json" for name in ("prm", "router")}
    async with (
        started("services.prm", ARBITRAGE_READY_FILE=str(files["prm"]), **variables) as prm,
        started("services.router", ARBITRAGE_READY_FILE=str(files["router"]), **variables) as judge,
    ):
        told = await ready(prm, files["prm"])
        prm_address = told["address"]
        assert (await http_answer(told["metrics_port"], "/ready")).split()[1] == b"200"
        router_address = (await ready(judge, files["router"]))["address"]
        async with grpc.aio.insecure_channel(prm_address) as channel:
            await serves(prm_address, PRM.full_name)
            described = await prm_pb2_grpc.PrmServiceStub(channel).GetPrm(prm_pb2.GetPrmRequest())
            assert described.max_context_tokens > 0
        async with grpc.aio.insecure_channel(router_address) as channel:
            await serves(router_address, ROUTER.full_name)
            stub: router_pb2_grpc.RouterServiceAsyncStub
            stub = router_pb2_grpc.RouterServiceStub(channel)
            answer = await stub.EstimateAdvantage(
                router_pb2.EstimateAdvantageRequest(problem=PROBLEM, candidate="14 + 8 = 22")
            )
            assert 0.0 <= answer.score <= 1.0
        for process in (prm, judge):
            process.terminate()
        for process in (prm, judge):
            code, written = await ended(process)
            assert code == 0, written


def test_the_services_have_the_names_that_health_checks_use() -> None:
    names = [service.full_name for service in (GENERATOR, PRM, ROUTER, ORCHESTRATOR)]
    assert names == [
        "arbitrage.v1.GeneratorService",
        "arbitrage.v1.PrmService",
        "arbitrage.v1.RouterService",
        "arbitrage.v1.OrchestratorService",
    ]
