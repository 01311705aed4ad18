"""No log line at INFO or above quotes a problem, a step or a key, whatever goes wrong."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from arbitrage.client import (
    Arbitrage,
    AsyncArbitrageClient,
    DraftOnly,
    PolicySpec,
    TargetOnly,
)
from arbitrage.core.errors import ArbitrageError
from services.rpc.api_keys import digest_of
from tests.services.fakes_engines import FakeGeneratorEngine, numbered
from tests.services.running import House, until
from tests.services.test_rpc_api_keys import entry
from tests.services.test_rpc_core_log import orchestrator

PROBLEM, STEP, KEY, WRONG = "marker-problem", "marker-step", "marker-key", "marker-wrong"
SECRETS = (PROBLEM, STEP, KEY, WRONG, digest_of(KEY), digest_of(WRONG))


class ClumsyError(Exception):
    """Quotes what it was working on."""

    def __init__(self) -> None:
        super().__init__(f"{PROBLEM} {STEP} {KEY}")


def clumsy_sink(*_: object) -> None:
    """Fails as a disk does not."""
    raise ClumsyError


async def ask(address: str, key: str, policy: PolicySpec) -> None:
    """Asks, whatever comes of it."""
    async with AsyncArbitrageClient(address, api_key=key, retries=0) as client:
        with suppress(ArbitrageError):
            await client.solve(PROBLEM, policy=policy, allow_degraded=False)


def assert_nothing_is_told(written: str) -> None:
    """Checks that no marker is in a log, and that there is one."""
    assert written
    assert [secret for secret in SECRETS if secret in written] == []


async def test_nothing_that_was_asked_or_answered_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    keys = tmp_path / "keys.toml"
    keys.write_text(entry(KEY, "acme"))
    monkeypatch.setattr("services.rpc.feedback_log.FeedbackLog.append", clumsy_sink)
    house = House(
        draft=FakeGeneratorEngine(write=numbered(STEP, 2)),
        target=FakeGeneratorEngine(write=numbered(STEP, 2)),
        settings={
            "api_keys_file": keys,
            "feedback_folder": tmp_path,
            "feedback_sample_rate": 1.0,
            "feedback_max_target_inflight": 8,
            "prefix_cache_mib": 0,
        },
    )
    async with house.open():
        await ask(house.address, WRONG, DraftOnly())
        await ask(house.address, KEY, Arbitrage(escalation_threshold=0.4))
        await until(lambda: "a step could not be observed" in caplog.text)
        engines: list[Any] = [house.router, house.prm, house.target, house.draft]
        for engine in engines:
            engine.error = ClumsyError()
            for policy in (Arbitrage(escalation_threshold=0.4), TargetOnly(), DraftOnly()):
                await ask(house.address, KEY, policy)
    assert "refused (unknown_key)" in caplog.text
    assert "failed with ClumsyError" in caplog.text
    assert_nothing_is_told(caplog.text)


@pytest.mark.slow
async def test_a_process_writes_nothing_of_it_either(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(entry(KEY, "acme"))
    engine = FakeGeneratorEngine(write=numbered(STEP, 2))
    async with orchestrator(tmp_path, engine, ARBITRAGE_API_KEYS_FILE=str(keys)) as running:
        await ask(running.address, KEY, TargetOnly())
        engine.error = ClumsyError()
        await ask(running.address, KEY, TargetOnly())
        await ask(running.address, WRONG, TargetOnly())
        assert await running.refused_count("unknown_key") == 1
        written = await running.stopped()
    assert "refused (unknown_key)" in written
    assert_nothing_is_told(written)
