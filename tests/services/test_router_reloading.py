"""The router is replaced while it serves: no call fails, and a bad one never serves."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.torch import load_file, save_file

from arbitrage.v1 import router_pb2, router_pb2_grpc
from services.engines.revisions import RevisionStore
from services.router.__main__ import RELOAD_HEALTH, build
from services.router.settings import RouterSettings
from services.rpc.settings import read_settings
from services.rpc.telemetry import Telemetry
from tests.services.running import ROUTER, serving, until
from tests.services.test_servicer_processes import ready, started

PACK = Path(__file__).resolve().parents[2] / "model_packs" / "tiny"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
ASKED = router_pb2.EstimateAdvantageRequest(
    problem="Ann owns 14. Bob has 8 more than Ann. How many pens does Bob have?",
    candidate="Bob has 8 more than Ann: 14 + 8 = 22; Bob owns 22.",
)


def changed_router(
    folder: Path,
    *,
    threshold: float = 0.5,
    weights: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None,
    fields: dict[str, Any] | None = None,
    keep_bytes: int | None = None,
) -> Path:
    """Makes a copy of the shipped router with changes."""
    shutil.copytree(PACK / "router", folder)
    described = json.loads((folder / "router.json").read_text())
    described |= {"default_threshold": threshold, **(fields or {})}
    (folder / "router.json").write_text(json.dumps(described))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    weights(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    if keep_bytes is not None:
        path.write_bytes(path.read_bytes()[:keep_bytes])
    return folder


BAD: dict[str, dict[str, Any]] = {
    "weights that are no numbers": {
        "weights": lambda tensors: tensors["score.weight"].fill_(float("nan"))
    },
    "a truncated file": {"keep_bytes": 5000},
    "a format nobody knows": {"fields": {"format_version": 9}},
    "a rule that the head does not have": {
        "fields": {
            "num_labels": 4,
            "score_rule": {"kind": "quantile", "first_positive_class": 2},
        }
    },
}


async def until_told(asked: Callable[[], Awaitable[bool]]) -> None:
    """Waits for a service to say so when it is asked."""
    async with asyncio.timeout(60):
        while not await asked():  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(0.02)


@dataclass
class Place:
    """A location with a running router service on it."""

    store: RevisionStore
    folder: Path
    telemetry: Telemetry
    stub: router_pb2_grpc.RouterServiceAsyncStub
    health: health_pb2_grpc.HealthStub

    async def promote(self, name: str, **changes: Any) -> str:
        """Promotes a changed router."""

        def work() -> str:
            revision = self.store.add(changed_router(self.folder / name, **changes))
            self.store.point_to(revision, {})
            return revision

        return await asyncio.to_thread(work)

    def metric(self, name: str, **labels: str) -> float | None:
        """Returns a metric of the service."""
        return self.telemetry.registry.get_sample_value(name, labels)

    async def health_of(self, service: str) -> int:
        """Returns what the health service says."""
        answer = await self.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        return int(answer.status)

    async def serving_revision(self) -> str:
        """Returns the revision that answers."""
        described = await self.stub.GetRouter(router_pb2.GetRouterRequest(), timeout=5)
        return described.model.revision.removesuffix("-float32")

    async def until_serving(self, revision: str) -> None:
        """Waits for a revision to answer."""

        async def serves() -> bool:
            return await self.serving_revision() == revision

        await until_told(serves)


@asynccontextmanager
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    """Serves the first of some routers from a folder that is looked at all the time."""
    location = tmp_path / "place"

    def first() -> RevisionStore:
        store = RevisionStore(str(location))
        store.point_to(store.add(changed_router(tmp_path / "first", threshold=0.1)), {})
        return store

    store = await asyncio.to_thread(first)
    telemetry = Telemetry()
    settings = read_settings(
        RouterSettings,
        {
            "ARBITRAGE_PORT": "0",
            "ARBITRAGE_MODEL": str(location),
            "ARBITRAGE_RELOAD_INTERVAL_S": "0.05",
        },
    )
    async with (
        build(settings, telemetry) as servicer,
        serving(ROUTER, servicer, telemetry) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub = router_pb2_grpc.RouterServiceStub(channel)
        yield Place(store, tmp_path, telemetry, stub, health_pb2_grpc.HealthStub(channel))


@pytest.mark.slow
async def test_no_call_fails_while_routers_are_replaced(tmp_path: Path) -> None:
    async with place(tmp_path) as at:
        known = {await at.serving_revision()}
        seen: list[str] = []
        is_over = False

        async def caller() -> None:
            while not is_over:
                answer = await at.stub.EstimateAdvantage(ASKED, timeout=20)
                seen.append(answer.model.revision.removesuffix("-float32"))

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(caller())
            tokens = 0.0
            for number in range(3):
                threshold = 0.2 + number / 10
                revision = await at.promote(f"next-{number}", threshold=threshold)
                known.add(revision)
                await at.until_serving(revision)
                now = at.metric("arbitrage_engine_tokens_total", role="router", kind="prefilled")
                assert now is not None
                assert now >= tokens
                tokens = now
            await asyncio.sleep(0.2)
            is_over = True
        assert set(seen) <= known
        assert seen[-1] == revision
        assert at.metric("arbitrage_router_reloads_total", result="ok") == 3
        assert at.metric("arbitrage_router_reload_rejected") == 0
        shown = at.metric("arbitrage_router_revision_info", revision=f"{revision}-float32")
        assert shown == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD)
async def test_a_bad_router_is_refused_and_shown_and_the_old_one_serves_on(
    tmp_path: Path, kind: str
) -> None:
    async with place(tmp_path) as at:
        good = await at.serving_revision()
        bad = await at.promote("bad", **BAD[kind])
        await until(lambda: at.metric("arbitrage_router_reload_rejected") == 1)
        assert await at.serving_revision() == good
        assert (await at.stub.EstimateAdvantage(ASKED, timeout=20)).model.revision.startswith(good)
        described = await at.stub.GetRouter(router_pb2.GetRouterRequest())
        assert described.rejected_revision == bad
        assert described.rejected_reason

        async def says_so() -> bool:
            status: int = await at.health_of(RELOAD_HEALTH)
            return status == int(NOT_SERVING)

        await until_told(says_so)
        assert await at.health_of(ROUTER.full_name) == SERVING
        await asyncio.sleep(0.2)
        # Several looks later it was counted and tried once.
        assert at.metric("arbitrage_router_reloads_total", result="rejected") == 1
        better = await at.promote("better", threshold=0.7)
        await at.until_serving(better)
        await until(lambda: at.metric("arbitrage_router_reload_rejected") == 0)
        assert not (await at.stub.GetRouter(router_pb2.GetRouterRequest())).rejected_revision


@pytest.mark.slow
async def test_a_place_out_of_reach_is_no_reason_to_stop(tmp_path: Path) -> None:
    async with place(tmp_path) as at:
        good = await at.serving_revision()
        pointer = tmp_path / "place" / "current.json"
        content = await asyncio.to_thread(pointer.read_bytes)
        await asyncio.to_thread(pointer.unlink)
        await asyncio.to_thread(pointer.mkdir)
        counted = ("arbitrage_router_reloads_total", "unreachable")
        await until(lambda: at.metric(counted[0], result=counted[1]))
        assert await at.serving_revision() == good
        await asyncio.to_thread(pointer.rmdir)
        await asyncio.to_thread(pointer.write_bytes, content)
        assert at.metric("arbitrage_router_reload_rejected") == 0


@pytest.mark.slow
async def test_sighup_makes_a_router_read_its_folder_again(tmp_path: Path) -> None:
    folder = await asyncio.to_thread(changed_router, tmp_path / "router", threshold=0.25)
    ready_file = tmp_path / "ready.json"
    async with started(
        "services.router", ARBITRAGE_MODEL=str(folder), ARBITRAGE_READY_FILE=str(ready_file)
    ) as process:
        address = (await ready(process, ready_file))["address"]
        async with grpc.aio.insecure_channel(address) as channel:
            stub = router_pb2_grpc.RouterServiceStub(channel)
            before = await stub.GetRouter(router_pb2.GetRouterRequest())
            assert before.default_threshold == 0.25
            text = await asyncio.to_thread((folder / "router.json").read_text)
            described = {**json.loads(text), "default_threshold": 0.75}
            await asyncio.to_thread((folder / "router.json").write_text, json.dumps(described))
            os.kill(process.pid, signal.SIGHUP)

            async def has_changed() -> bool:
                now = await stub.GetRouter(router_pb2.GetRouterRequest())
                differs: bool = now.model.revision != before.model.revision
                return differs

            await until_told(has_changed)
            after = await stub.GetRouter(router_pb2.GetRouterRequest())
    assert after.default_threshold == 0.75
    assert after.model.revision != before.model.revision
