"""Metrics: their registry, the ones every server has, and the port they are read on.

Each program has a registry of its own, so that two servers in one process do not share counts.
Labels are bounded, and every series is there at 0 from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import Thread
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIServer

import grpc
from grpc_health.v1 import health
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)

from arbitrage.status import CODES
from services.rpc.refusals import Refusals

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

ROLES: Final = ("draft", "target", "prm", "router")
# Steps take between a millisecond (a cached answer) and minutes (a large model's long step).
SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120)


class RpcMetrics:
    """Counts the calls a server answers."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "arbitrage_rpc_requests",
            "Calls answered, by method and gRPC code.",
            ("method", "code"),
            registry=registry,
        )
        self._seconds = Histogram(
            "arbitrage_rpc_seconds",
            "Time from a call's arrival to its end.",
            ("method",),
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )

    def register(self, methods: Iterable[str]) -> None:
        """Makes every series of these methods appear, at 0."""
        for method in methods:
            self._seconds.labels(method)
            for code in (grpc.StatusCode.OK, *CODES.values()):
                self._requests.labels(method, code.name)

    def count(self, method: str, code: grpc.StatusCode, seconds: float) -> None:
        """Counts one call that ended."""
        self._requests.labels(method, code.name).inc()
        self._seconds.labels(method).observe(seconds)


class PoolMetrics:
    """Counts what pools do with their replicas."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._replicas = Gauge(
            "arbitrage_pool_replicas",
            "Replicas that are known: ready, or ejected after a failure.",
            ("role", "state"),
            registry=registry,
        )
        self._retries = Counter(
            "arbitrage_pool_retries",
            "Calls that were made again on another replica.",
            ("role",),
            registry=registry,
        )
        self._hedges = Counter(
            "arbitrage_pool_hedges",
            "Slow calls that were made of a second replica too.",
            ("role",),
            registry=registry,
        )
        self._hedges_won = Counter(
            "arbitrage_pool_hedges_won",
            "Hedged calls that the second replica answered first.",
            ("role",),
            registry=registry,
        )
        self._ejections = Counter(
            "arbitrage_pool_ejections",
            "Times that a replica was left out because it failed.",
            ("role",),
            registry=registry,
        )
        for role in ROLES:
            self.show(role, 0, 0)
            self._retries.labels(role)
            self._hedges.labels(role)
            self._hedges_won.labels(role)
            self._ejections.labels(role)

    def show(self, role: str, ready_count: int, ejected_count: int) -> None:
        """Says how many replicas there are."""
        self._replicas.labels(role, "ready").set(ready_count)
        self._replicas.labels(role, "ejected").set(ejected_count)

    def count_retry(self, role: str) -> None:
        """Counts a call made again."""
        self._retries.labels(role).inc()

    def count_hedge(self, role: str) -> None:
        """Counts a call made of a second replica too."""
        self._hedges.labels(role).inc()

    def count_hedge_won(self, role: str) -> None:
        """Counts one that it answered first."""
        self._hedges_won.labels(role).inc()

    def count_ejection(self, role: str) -> None:
        """Counts a replica left out."""
        self._ejections.labels(role).inc()


class FailedReloads:
    """Counts files that changed and could not be used, so that what they said before serves on."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._counter = Counter(
            "arbitrage_failed_reloads",
            "Changed files that could not be used; what they said before stays in force.",
            ("what",),
            registry=registry,
        )
        # Every server may have certificates.
        self.of("tls")

    def of(self, what: str) -> Callable[[], None]:
        """Makes the series of some files appear, at 0, and returns what counts one failure."""
        return self._counter.labels(what).inc


class Telemetry:
    """Holds what a program shows of itself: its metrics, and its health by service name."""

    def __init__(self) -> None:
        # The moment each counter began is a second series for each, and nobody looks at it.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # untyped there
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.rpc = RpcMetrics(self.registry)
        self.refusals = Refusals(self.registry)
        self.failed_reloads = FailedReloads(self.registry)
        self.health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # stubs lack it


@dataclass(frozen=True, slots=True)
class MetricsEndpoint:
    """Serves `/metrics` from a thread of its own, so that a busy event loop can be seen as one.

    Beside it `/live` says that the program runs, and `/ready` whether it takes calls: for probers
    that have no certificate, where gRPC asks for one.
    """

    server: WSGIServer
    thread: Thread

    @classmethod
    def start(
        cls, telemetry: Telemetry, host: str, port: int, is_ready: Callable[[], bool]
    ) -> MetricsEndpoint:
        """Starts listening; port 0 takes a free one. `is_ready` is asked from another thread.

        Raises:
            OSError: the port is taken or the address is not this machine's.
        """
        started: Any = start_http_server(port, host, telemetry.registry)
        server, thread = started
        server.set_app(_with_health(server.get_app(), is_ready))
        return cls(server, thread)

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return self.server.server_port

    def close(self) -> None:
        """Stops listening; blocks up to half a second."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def _with_health(metrics: WSGIApplication, is_ready: Callable[[], bool]) -> WSGIApplication:
    """Returns an application that answers probes itself, and leaves the rest to `metrics`."""

    def answer(environ: WSGIEnvironment, respond: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path not in {"/live", "/ready"}:
            return metrics(environ, respond)
        is_well = path == "/live" or is_ready()
        respond(
            "200 OK" if is_well else "503 Service Unavailable", [("Content-Type", "text/plain")]
        )
        return [b"ok\n" if is_well else b"not serving\n"]

    return answer
