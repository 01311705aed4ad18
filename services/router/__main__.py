"""`python -m services.router`: settings, engine, servicer, serve, and reload."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path

from grpc_health.v1 import health_pb2

from arbitrage.v1 import router_pb2
from services.engines.base import RouterEngine
from services.engines.loading import ModelLoadError
from services.engines.pack_manifest import PackError
from services.engines.revisions import RevisionError, RevisionStore, is_location
from services.router.reloading import ReloadingRouter, RouterSource
from services.router.servicer import RouterServicer
from services.router.settings import RouterSettings
from services.router.sources import FixedRouter, PromotedRouters, RouterFolder
from services.router.telemetry import ReloadMetrics, register
from services.rpc.judge_program import kserve_needed, running_remote_judge
from services.rpc.model_program import (
    EngineMetrics,
    in_daemon_thread,
    made_ready,
    resolved_model,
)
from services.rpc.program import Program, StartError, main
from services.rpc.server import rpc_server
from services.rpc.settings import variable_of
from services.rpc.telemetry import Telemetry

_log = logging.getLogger(__name__)
_SERVICE = router_pb2.DESCRIPTOR.services_by_name["RouterService"]
# Beside the service's own health: whether it serves the revision that it should.
RELOAD_HEALTH = f"{_SERVICE.full_name}.reload"


@asynccontextmanager
async def build(settings: RouterSettings, telemetry: Telemetry) -> AsyncIterator[RouterServicer]:
    """Makes the servicer around a loaded, warm model, here or on another server."""
    async with _engine(settings, telemetry) as engine, _predictor(settings, engine):
        yield RouterServicer(engine)


def _engine(
    settings: RouterSettings, telemetry: Telemetry
) -> AbstractAsyncContextManager[RouterEngine]:
    if settings.engine == "transformers":
        return _reloading_router(settings, telemetry)
    with kserve_needed("engine"):
        from services.router.predictor import remote_router
    return running_remote_judge(settings, telemetry, "router", partial(remote_router, settings))


def _predictor(settings: RouterSettings, engine: RouterEngine) -> AbstractAsyncContextManager[None]:
    if not settings.is_predictor:
        return nullcontext()
    with kserve_needed("kserve_http_port"):
        from services.router.predictor import predictor
    return predictor(settings, engine)


@asynccontextmanager
async def _reloading_router(
    settings: RouterSettings, telemetry: Telemetry
) -> AsyncIterator[ReloadingRouter]:
    """Makes a router of this process, which is replaced when a new one comes."""
    async with _opened_source(settings) as source:
        revision = await asyncio.to_thread(source.latest)
        engine: RouterEngine = await in_daemon_thread(lambda: source.load(revision))
        counts = ReloadMetrics(telemetry.registry)
        router = ReloadingRouter(engine, revision, source, in_daemon_thread, counts)
        try:
            await made_ready(router)
            telemetry.registry.register(EngineMetrics(router, "router"))
            register(telemetry.registry, router)
            await _show(telemetry, router)
            # Only a place of promotions is looked at by itself; files may be half replaced.
            is_watched = isinstance(source, PromotedRouters)
            interval_s = settings.reload_interval_s if is_watched else 0.0
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(_watch(router, telemetry, interval_s))
                yield router
                watch.cancel()
        finally:
            await router.close()


async def _watch(router: ReloadingRouter, telemetry: Telemetry, interval_s: float) -> None:
    """Reloads at every interval and on SIGHUP, until it is cancelled."""
    loop, hung_up = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, hung_up.set)
    try:
        while True:
            try:
                async with asyncio.timeout(interval_s or None):
                    await hung_up.wait()
            except TimeoutError:
                pass
            is_asked = hung_up.is_set()
            hung_up.clear()
            try:
                await router.reload(again=is_asked)
            except Exception:  # noqa: BLE001 - a defect here must not end a router that serves
                _log.exception("looking for a new router failed; the present one serves on")
            await _show(telemetry, router)
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


async def _show(telemetry: Telemetry, router: ReloadingRouter) -> None:
    status = health_pb2.HealthCheckResponse
    serving = status.SERVING if router.rejection is None else status.NOT_SERVING
    await telemetry.health.set(RELOAD_HEALTH, serving)


@asynccontextmanager
async def _opened_source(settings: RouterSettings) -> AsyncIterator[RouterSource]:
    """Makes the source that the settings name; what was fetched for it goes with it.

    Raises:
        StartError
    """
    cache = await asyncio.to_thread(tempfile.TemporaryDirectory, prefix="arbitrage-router-")
    try:
        yield await asyncio.to_thread(_source, settings, Path(cache.name))
    except (PackError, RevisionError, ModelLoadError) as error:
        raise StartError(f"{variable_of('model')}: {error}") from error
    finally:
        await asyncio.to_thread(cache.cleanup)


def _source(settings: RouterSettings, cache: Path) -> RouterSource:
    if is_location(settings.model):
        store = RevisionStore(settings.model)
        return PromotedRouters(settings, store, settings.model_cache or cache)
    reference = resolved_model(settings.model, "router")
    folder = Path(reference).expanduser()
    return RouterFolder(settings, folder) if folder.is_dir() else FixedRouter(settings, reference)


ROUTER = Program(
    component="router",
    server=rpc_server(_SERVICE),
    settings=RouterSettings,
    build=build,
)

if __name__ == "__main__":
    sys.exit(main(ROUTER))
