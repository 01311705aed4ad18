"""What a router service shows of its revisions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.router.reloading import ReloadingRouter

RELOAD_RESULTS: Final = ("ok", "rejected", "unreachable")


class ReloadMetrics:
    """Counts how looking for a new revision ended."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._reloads = Counter(
            "arbitrage_router_reloads",
            "New revisions by what became of them: ok (serving), rejected, or unreachable (their "
            "place could not be read).",
            ("result",),
            registry=registry,
        )
        for result in RELOAD_RESULTS:
            self._reloads.labels(result)

    def count(self, result: str) -> None:
        """Counts one."""
        self._reloads.labels(result).inc()


class RevisionMetrics(Collector):
    """Shows the serving revision, and no other."""

    def __init__(self, router: ReloadingRouter) -> None:
        self._router = router

    def collect(self) -> Iterator[Metric]:
        """Yields the revision as a label of a series that is 1."""
        info = GaugeMetricFamily(
            "arbitrage_router_revision_info", "The serving revision.", labels=("revision",)
        )
        info.add_metric((self._router.identity.revision,), 1)
        yield info


def register(registry: CollectorRegistry, router: ReloadingRouter) -> None:
    """Shows the serving revision and whether another was refused."""
    registry.register(RevisionMetrics(router))
    Gauge(
        "arbitrage_router_reload_rejected",
        "1 while the revision that should serve is one that was refused.",
        registry=registry,
    ).set_function(lambda: float(router.rejection is not None))
