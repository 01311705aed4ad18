"""`python -m services.orchestrator`: settings, channels, servicer, serve."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry

from arbitrage.v1 import orchestrator_pb2
from services.orchestrator.admission import Admission
from services.orchestrator.feedback import Feedback, Judges
from services.orchestrator.models import RemoteModels, connected_models
from services.orchestrator.prefix_cache import PrefixCache
from services.orchestrator.redis_store import opened_redis
from services.orchestrator.requests import RequestRules
from services.orchestrator.servicer import Desk, OrchestratorServicer
from services.orchestrator.settings import OrchestratorSettings
from services.orchestrator.store import MemoryStore
from services.orchestrator.telemetry import (
    CacheMetrics,
    FeedbackMetrics,
    RouterMetrics,
    SolutionMetrics,
    StoreMetrics,
    TargetDemand,
    register_admission,
    register_target_queue,
)
from services.rpc.feedback_log import FeedbackLog
from services.rpc.program import Program, main
from services.rpc.telemetry import Telemetry


@asynccontextmanager
async def build(
    settings: OrchestratorSettings, telemetry: Telemetry
) -> AsyncIterator[OrchestratorServicer]:
    """Makes the servicer once draft and target are serving."""
    registry = telemetry.registry
    admission = Admission(settings.max_concurrency, settings.max_queue)
    register_admission(registry, admission)
    metrics, demand = SolutionMetrics(registry), TargetDemand(registry)
    register_target_queue(registry, admission, demand)
    router_metrics = RouterMetrics(registry)
    async with (
        opened_cache(settings, registry) as cache,
        connected_models(settings, cache, demand, router_metrics) as models,
    ):
        rules = RequestRules(settings.caps, settings.default_budgets, models.policies)
        feedback_metrics = FeedbackMetrics(registry, metrics.count_shadow)
        async with running_feedback(settings, models, feedback_metrics) as feedback:
            yield OrchestratorServicer(
                Desk(rules, admission, models, metrics, settings.router_fallback, feedback)
            )


@asynccontextmanager
async def opened_cache(
    settings: OrchestratorSettings, registry: CollectorRegistry
) -> AsyncIterator[PrefixCache | None]:
    """Makes the prefix cache on the store that the settings name; None where it is turned off.

    Raises:
        StartError: the store cannot be used.
    """
    metrics = CacheMetrics(registry)
    if not settings.prefix_cache_bytes:
        yield None
    elif settings.store_url is None:
        store = MemoryStore(settings.prefix_cache_bytes)
        yield PrefixCache(store, settings.prefix_cache_ttl_s, metrics)
    else:
        url = settings.store_url.get_secret_value()
        async with opened_redis(url, StoreMetrics(registry)) as redis:
            yield PrefixCache(redis, settings.prefix_cache_ttl_s, metrics)


@asynccontextmanager
async def running_feedback(
    settings: OrchestratorSettings, models: RemoteModels, metrics: FeedbackMetrics
) -> AsyncIterator[Feedback | None]:
    """Makes what observes steps in the background, and gives up what is running on the way out."""
    if settings.feedback_folder is None or models.prm is None or models.router is None:
        yield None
        return
    judges = Judges(
        models.target,
        models.prm,
        models.router.describe_model,
        lambda: models.demand.inflight_count,
    )
    log = FeedbackLog(settings.feedback_folder, settings.feedback_file_mib)
    async with asyncio.TaskGroup() as group:
        feedback = Feedback(settings.feedback_rules, judges, log, metrics, group)
        yield feedback
        feedback.close()


ORCHESTRATOR = Program(
    component="orchestrator",
    service=orchestrator_pb2.DESCRIPTOR.services_by_name["OrchestratorService"],
    settings=OrchestratorSettings,
    build=build,
)

if __name__ == "__main__":
    sys.exit(main(ORCHESTRATOR))
