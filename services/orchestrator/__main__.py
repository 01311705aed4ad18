"""`python -m services.orchestrator`: settings, channels, servicer, serve."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

from prometheus_client import CollectorRegistry

from arbitrage.v1 import orchestrator_pb2
from services.orchestrator.admission import Admission
from services.orchestrator.feedback import Feedback, Judges, Sink
from services.orchestrator.load_price import TargetPrice
from services.orchestrator.models import RemoteModels, connected_models
from services.orchestrator.prefix_cache import PrefixCache
from services.orchestrator.quotas import Buckets, MemoryBuckets, Quotas, RedisBuckets
from services.orchestrator.redis_feedback import RedisFeedback
from services.orchestrator.redis_link import RedisLink, opened_redis
from services.orchestrator.redis_store import RedisStore
from services.orchestrator.requests import RequestRules
from services.orchestrator.servicer import Desk, OrchestratorServicer
from services.orchestrator.sessions import Sessions
from services.orchestrator.settings import OrchestratorSettings
from services.orchestrator.store import MemoryStore
from services.orchestrator.telemetry import (
    AdmissionMetrics,
    CacheMetrics,
    FeedbackMetrics,
    QuotaMetrics,
    RouterMetrics,
    SessionMetrics,
    SolutionMetrics,
    StoreMetrics,
    TargetDemand,
    register_admission,
    register_price,
    register_target_queue,
)
from services.rpc.api_keys import ApiKeys
from services.rpc.auth import Anyone, Authenticator
from services.rpc.background import in_background
from services.rpc.feedback_log import FeedbackLog
from services.rpc.program import Program, main
from services.rpc.server import rpc_server
from services.rpc.telemetry import PoolMetrics, Telemetry
from services.rpc.tls import ChannelOpener

# How long a stop waits for answers on their way to Redis.
_LAST_ANSWERS_S: Final = 1.0


@asynccontextmanager
async def build(
    settings: OrchestratorSettings, telemetry: Telemetry
) -> AsyncIterator[OrchestratorServicer]:
    """Makes the servicer once draft and target are serving."""
    registry = telemetry.registry
    store_metrics, session_metrics = StoreMetrics(registry), SessionMetrics(registry)
    admission = Admission(
        settings.max_concurrency,
        settings.max_queue,
        settings.tenant_max_share,
        AdmissionMetrics(registry).observe,
    )
    register_admission(registry, admission)
    metrics, demand = SolutionMetrics(registry), TargetDemand(registry)
    register_target_queue(registry, admission, demand)
    router_metrics, quota_metrics = RouterMetrics(registry), QuotaMetrics(registry)
    for what in ("models_tls", "api_keys"):
        telemetry.failed_reloads.of(what)
    opener = await asyncio.to_thread(channel_opener, settings, telemetry)
    async with (
        opened_link(settings, store_metrics) as link,
        opened_cache(settings, link, registry) as cache,
        opened_sessions(settings, link, session_metrics) as sessions,
        connected_models(
            settings, opener, cache, demand, router_metrics, PoolMetrics(registry)
        ) as models,
        watched_revisions(cache, models),
    ):
        rules = RequestRules(settings.caps, settings.default_budgets, models.policies)
        price = TargetPrice(settings.target_step_capacity, lambda: demand.inflight_count)
        register_price(registry, price)
        buckets: Buckets = MemoryBuckets()
        if link is not None:
            buckets = RedisBuckets(link, quota_metrics)
        quotas = Quotas(settings.default_limits, buckets, quota_metrics)
        feedback_metrics = FeedbackMetrics(registry, metrics.count_shadow)
        async with running_feedback(settings, link, models, feedback_metrics) as feedback:
            yield OrchestratorServicer(
                Desk(
                    rules,
                    admission,
                    quotas,
                    models,
                    metrics,
                    settings.router_fallback,
                    price,
                    feedback,
                    sessions,
                )
            )


def channel_opener(settings: OrchestratorSettings, telemetry: Telemetry) -> ChannelOpener:
    """Opens channels to models as the settings say.

    Raises:
        TlsError: a file cannot be used.
    """
    files = None
    if settings.models_tls is not None:
        files = settings.models_tls.watched(telemetry.failed_reloads.of("models_tls"))
    return ChannelOpener(settings.max_message_mib, files)


def authenticator(settings: OrchestratorSettings, telemetry: Telemetry) -> Authenticator:
    """Asks for an API key where the settings name a file of them.

    Raises:
        KeysError: the file cannot be used.
    """
    if settings.api_keys_file is None:
        return Anyone()
    return ApiKeys(settings.api_keys_file, telemetry.failed_reloads.of("api_keys"))


@asynccontextmanager
async def opened_link(
    settings: OrchestratorSettings, metrics: StoreMetrics
) -> AsyncIterator[RedisLink | None]:
    """Connects to the Redis that the settings name; None where they name none.

    Raises:
        StartError: it can never serve.
    """
    if settings.store_url is None:
        yield None
        return
    url = settings.store_url.get_secret_value()
    async with opened_redis(url, metrics, settings.store_timeout_s) as link:
        yield link


@asynccontextmanager
async def opened_cache(
    settings: OrchestratorSettings, link: RedisLink | None, registry: CollectorRegistry
) -> AsyncIterator[PrefixCache | None]:
    """Makes the prefix cache, in Redis where there is one; None where it is turned off."""
    metrics = CacheMetrics(registry)
    if not settings.prefix_cache_bytes:
        yield None
    elif link is None:
        store = MemoryStore(settings.prefix_cache_bytes)
        yield PrefixCache(store, settings.prefix_cache_ttl_s, metrics)
    else:
        shared = RedisStore(link)
        async with in_background(shared.maintain()):
            yield PrefixCache(shared, settings.prefix_cache_ttl_s, metrics)
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_ANSWERS_S):
                    await shared.written()


@asynccontextmanager
async def opened_sessions(
    settings: OrchestratorSettings, link: RedisLink | None, metrics: SessionMetrics
) -> AsyncIterator[Sessions | None]:
    """Makes what keeps sessions; None without a Redis to keep them in."""
    if link is None:
        yield None
        return
    sessions = Sessions(link, settings.session_rules, metrics)
    async with in_background(sessions.renew()):
        yield sessions


@asynccontextmanager
async def watched_revisions(cache: PrefixCache | None, models: RemoteModels) -> AsyncIterator[None]:
    """Lets the prefix cache know which revisions serve."""
    if cache is None:
        yield
        return
    async with in_background(cache.watch(models.describes)):
        yield


@asynccontextmanager
async def running_feedback(
    settings: OrchestratorSettings,
    link: RedisLink | None,
    models: RemoteModels,
    metrics: FeedbackMetrics,
) -> AsyncIterator[Feedback | None]:
    """Makes what observes steps in the background, and gives up what is running on the way out."""
    sink = feedback_sink(settings, link)
    if sink is None or models.prm is None or models.router is None:
        yield None
        return
    judges = Judges(
        models.target,
        models.prm,
        models.router.describe_model,
        lambda: models.demand.inflight_count,
    )
    async with asyncio.TaskGroup() as group:
        feedback = Feedback(settings.feedback_rules, judges, sink, metrics, group)
        yield feedback
        feedback.close()


def feedback_sink(settings: OrchestratorSettings, link: RedisLink | None) -> Sink | None:
    """Returns what keeps feedback records; None where none are made."""
    if not settings.feedback_sample_rate:
        return None
    if settings.feedback_folder is not None:
        return FeedbackLog(settings.feedback_folder, settings.feedback_file_mib)
    return None if link is None else RedisFeedback(link, settings.feedback_stream_bytes)


ORCHESTRATOR = Program(
    component="orchestrator",
    server=rpc_server(orchestrator_pb2.DESCRIPTOR.services_by_name["OrchestratorService"]),
    settings=OrchestratorSettings,
    build=build,
    authenticator=authenticator,
)

if __name__ == "__main__":
    sys.exit(main(ORCHESTRATOR))
