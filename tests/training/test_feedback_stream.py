"""`collect --from-feedback redis://…`: what orchestrators observed becomes rows, once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from redis import Redis

from arbitrage.v1 import orchestrator_pb2 as pb
from router_training.__main__ import main
from router_training.rows import Row, RowFolder
from services.rpc.feedback_stream import FEEDBACK_STREAM
from tests.services.certificates import SERVER_NAMES, Authority
from tests.services.redis_servers import (
    RedisServer,
    free_port,
    give_all_slots,
    redis_server,
    speaks_tls,
)
from tests.services.running import House, asking, solution, until

RECORDS = "arbitrage_feedback_records_total"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as running:
        yield running


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


def collect(work: Path, feedback: str) -> int:
    """Runs the command and returns its exit code."""
    config = Path("router_training/configs/tiny.toml")
    arguments = ["--config", str(config), "--set", f"work={work}", "--from-feedback", feedback]
    return main(["collect", *arguments])


def rows(work: Path) -> list[Row]:
    return sorted(RowFolder(work / "rows").read(), key=lambda row: (row.problem, row.step_index))


async def observe(house: House, *problems: str) -> None:
    """Solves problems and waits for the records of their three steps each."""
    house.router.score = 0.3
    house.prm.score_of = lambda text: 0.9 if text.startswith("target") else 0.3
    house.settings |= {
        "feedback_sample_rate": 1.0,
        "feedback_max_inflight": 64,
        "feedback_max_target_inflight": 64,
    }
    async with house.open() as stub:
        for problem in problems:
            await solution(stub, asking(problem=problem, arbitrage=pb.ArbitragePolicy()))
        await until(lambda: house.metric(RECORDS, result="written") == 3 * len(problems))


async def test_the_rows_are_those_of_a_folder_and_a_second_run_adds_only_what_is_new(
    server: RedisServer, work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await observe(House(settings={"store_url": server.url}), "1 + 1?", "2 + 2?")
    assert await asyncio.to_thread(collect, work, server.url) == 0
    assert await asyncio.to_thread(collect, work, server.url) == 0
    assert "collect: 6 rows from feedback" in caplog.messages
    assert "collect: 0 rows from feedback" in caplog.messages
    await observe(House(settings={"store_url": server.url}), "3 + 3?")
    assert await asyncio.to_thread(collect, work, server.url) == 0
    assert "collect: 3 rows from feedback" in caplog.messages

    folder, other = tmp_path / "feedback", tmp_path / "other"
    await observe(House(settings={"feedback_folder": folder}), "1 + 1?", "2 + 2?", "3 + 3?")
    assert await asyncio.to_thread(collect, other, str(folder)) == 0
    of_redis = [replace(row, request_id="") for row in await asyncio.to_thread(rows, work)]
    of_folder = [replace(row, request_id="") for row in await asyncio.to_thread(rows, other)]
    assert len(of_redis) == 9
    assert of_redis == of_folder


def test_a_redis_that_is_away_is_named_without_its_password(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    assert collect(work, f"redis://me:secret@127.0.0.1:{port}/0") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(
        f"collect: --from-feedback redis://127.0.0.1:{port}/0: it cannot be read ("
    )
    assert said.endswith("start Redis or correct the URL, and run the same command again")
    assert "secret" not in said


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1", "--from-feedback http://127.0.0.1: expected one of redis://"),
        ("redis+sentinel://127.0.0.1:1", "expected the primary's name"),
    ],
)
def test_a_url_that_is_none_is_named(
    work: Path, capsys: pytest.CaptureFixture[str], url: str, said: str
) -> None:
    assert collect(work, url) == 2
    assert said in capsys.readouterr().err


def test_a_redis_without_records_is_told_and_ends_no_schedule(
    server: RedisServer, work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert collect(work, server.url) == 0
    assert f"{server.url}: it holds no records" in caplog.text


def test_what_is_no_stream_or_no_record_is_named(
    server: RedisServer, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Redis(port=server.port) as client:
        client.set(FEEDBACK_STREAM, "a text")
        assert collect(work, server.url) == 2
        assert "it cannot be read (WRONGTYPE" in capsys.readouterr().err
        client.delete(FEEDBACK_STREAM)
        client.xadd(FEEDBACK_STREAM, {"record": b"\xff"}, id="5-0")
        assert collect(work, server.url) == 2
        assert "entry 5-0 of arbitrage:feedback is no record" in capsys.readouterr().err


def test_a_wrong_password_is_refused(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with redis_server(tmp_path, "--requirepass", "right") as guarded:
        assert collect(work, f"redis://:wrong-one@127.0.0.1:{guarded.port}") == 2
    said = capsys.readouterr().err
    assert "Redis refuses user or password" in said
    assert "wrong-one" not in said


async def test_records_come_from_a_cluster(work: Path, tmp_path: Path) -> None:
    with redis_server(tmp_path, "--cluster-enabled", "yes") as node:
        await asyncio.to_thread(give_all_slots, node)
        cluster = f"redis+cluster://127.0.0.1:{node.port}"
        await observe(House(settings={"store_url": cluster}), "1 + 1?")
        assert await asyncio.to_thread(collect, work, cluster) == 0
    assert len(await asyncio.to_thread(rows, work)) == 3


@pytest.mark.skipif(not speaks_tls(), reason="this redis-server was built without TLS")
async def test_records_come_over_tls(work: Path, tmp_path: Path) -> None:
    authority, port = Authority(tmp_path), free_port()
    certificate, key = authority.issue("redis", *SERVER_NAMES)
    tls = (
        *("--tls-port", str(port), "--tls-auth-clients", "no"),
        *("--tls-cert-file", str(certificate), "--tls-key-file", str(key)),
        *("--tls-ca-cert-file", str(authority.path)),
    )
    with redis_server(tmp_path, *tls) as node:
        await observe(House(settings={"store_url": node.url}), "1 + 1?")
        url = f"rediss://localhost:{port}?ssl_ca_certs={authority.path}"
        assert await asyncio.to_thread(collect, work, url) == 0
    assert len(await asyncio.to_thread(rows, work)) == 3
