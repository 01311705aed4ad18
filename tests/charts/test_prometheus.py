"""A real Prometheus finds in real services what the chart's queries ask for."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import yaml
from prometheus_client import generate_latest

from arbitrage.client import AsyncArbitrageClient, Random, TargetOnly
from tests.charts.cases import CASES
from tests.charts.prometheus import Prometheus, Unanswered
from tests.charts.rendering import of_kind, rendered
from tests.load.processes import Deployment, Service, deployed
from tests.services.running_gateway import running_gateway

pytestmark = [pytest.mark.deploy, pytest.mark.slow, pytest.mark.timeout(400)]

KEDA = {"mode": "keda", "keda": {"serverAddress": "http://prometheus:9090"}}
PROBLEM = "Compute 17 + 26 + 35."
INFLIGHT = "arbitrage_target_inflight_steps"
QUEUED = "arbitrage_target_queue_depth"


def queries() -> dict[str, str]:
    """Returns what the chart asks Prometheus for about the target, by the trigger's name."""
    scalers = of_kind(rendered({"target": {"autoscaling": KEDA}}), "ScaledObject")
    triggers = scalers["try-arbitrage-target"]["spec"]["triggers"]
    return {trigger["name"]: trigger["metadata"]["query"] for trigger in triggers}


@asynccontextmanager
async def scraped(folder: Path) -> AsyncIterator[tuple[Deployment, Prometheus]]:
    """Runs three orchestrators and four targets, of which one is known, and a Prometheus."""
    # Each step is the target's, one at a time: nearly all that is asked of it waits there.
    async with deployed(
        folder,
        targets=4,
        orchestrators=3,
        settings={"prefix_cache_mib": "0"},
        target_settings={"max_batch": "1"},
    ) as deployment:
        prometheus = Prometheus(folder, "1s")
        services = deployment.services
        prometheus.scrape({name: one.metrics_port for name, one in services.items()})
        deployment.write_targets("target-0")
        try:
            await prometheus.start()
            yield deployment, prometheus
        finally:
            await prometheus.stop()


async def eventually(value: Callable[[], Awaitable[float]], wanted: float) -> None:
    """Waits until something has this value."""
    seen: float | None = None
    try:
        async with asyncio.timeout(60):
            while (seen := await value()) != wanted:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.2)
    except TimeoutError:
        raise AssertionError(f"{seen} and never {wanted}") from None


async def total(deployment: Deployment, *names: str) -> float:
    """Returns the sum of metrics by the orchestrators' own word."""
    orchestrators = deployment.named("orchestrator")
    return sum([await one.metric(name) for one in orchestrators for name in names])


@asynccontextmanager
async def loaded(deployment: Deployment, count: int) -> AsyncIterator[None]:
    """Has so many solutions written by the target at any time, until it is left."""
    is_over = False

    async def work(number: int) -> None:
        while not is_over:
            await _solved(deployment.addresses[number % 3])

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(work(number))
        try:
            yield
        finally:
            is_over = True


async def _solved(address: str) -> str:
    async with AsyncArbitrageClient([address], retries=3) as client:
        return (await client.solve(PROBLEM, policy=TargetOnly())).text


async def test_a_query_gives_one_element_with_the_value_that_the_services_tell(
    tmp_path: Path,
) -> None:
    async with scraped(tmp_path) as (deployment, prometheus):
        asks = {name: partial(prometheus.one, query) for name, query in queries().items()}
        load, demand = asks["target-load"], asks["target-demand"]
        seen = partial(prometheus.one, f"count({INFLIGHT}) or vector(0)")
        targets_up = partial(prometheus.one, 'count(up{pod=~"target-.*"} == 1) or vector(0)')
        await eventually(seen, 3)
        assert await load() == 0
        # Two steps of each orchestrator make six, however many targets there are.
        async with loaded(deployment, 6):
            await eventually(load, 6)
            deployment.write_targets("target-0", "target-1", "target-2", "target-3")
            await eventually(targets_up, 4)
            await eventually(load, 6)
            assert 0 < await demand() < 60
        gone = deployment.services["target-3"]
        assert await gone.stop(signal.SIGTERM) == 0
        deployment.write_targets("target-0", "target-1", "target-2")
        await eventually(targets_up, 3)
        await eventually(load, 0)
        # At zero the signal is there all the same: what found no target brings the first one back.
        deployment.write_targets()
        for target in deployment.named("target"):
            await target.stop(signal.SIGTERM)
        assert await load() == 0
        async with AsyncArbitrageClient(deployment.addresses) as client:
            await client.solve(PROBLEM, policy=Random(1.0), allow_degraded=True)
        missed = await total(deployment, QUEUED)
        assert missed > 0
        await eventually(load, missed)
        with pytest.raises(Unanswered, match="0 elements"):
            await prometheus.one(queries()["target-load"].replace('"try"', '"another"'))


async def test_what_scalers_dashboards_and_alerts_ask_for_is_in_the_metrics_of_services(
    tmp_path: Path,
) -> None:
    values, *files = CASES["paper-vllm"]
    kinds = {"ScaledObject", "PrometheusRule", "ConfigMap"}
    text = yaml.safe_dump_all([o for o in rendered(values, *files) if o["kind"] in kinds])
    wanted = set(re.findall(r"\barbitrage_\w+", text))
    async with deployed(tmp_path, targets=1, orchestrators=1) as deployment:
        await _solved(deployment.addresses[0])
        pages = [await asyncio.to_thread(_metrics, one) for one in deployment.services.values()]
    async with running_gateway("127.0.0.1:1") as gateway:
        pages.append(generate_latest(gateway.telemetry.registry).decode())
    told = set(re.findall(r"^(\w+)", "\n".join(pages), re.MULTILINE))
    assert len(wanted) > 15
    assert wanted - told == set()


def _metrics(service: Service) -> Any:
    with urlopen(f"http://127.0.0.1:{service.metrics_port}/metrics", timeout=5) as answer:
        return answer.read().decode()
