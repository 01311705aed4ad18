"""A target pool of real processes, and the autoscaler's loop over it: all but the cluster."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import psutil

from tests.charts.prometheus import Prometheus, Unanswered
from tests.load.horizontal_autoscaler import (
    SYNC_S,
    HorizontalAutoscaler,
    by_average_value,
    by_utilization,
    of_metrics,
)
from tests.load.processes import Deployment, Service


@dataclass
class Pool:
    """The target's replicas. The youngest goes first."""

    deployment: Deployment
    prometheus: Prometheus
    running: list[Service] = field(default_factory=list)
    ready: list[str] = field(default_factory=list)
    exit_codes: list[int] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def adopt(self, running: Sequence[Service]) -> None:
        """Takes replicas that serve already."""
        self.running.extend(running)
        self.ready.extend(service.name for service in running)

    def resize(self, count: int) -> None:
        """Starts or stops replicas without waiting; each serves once it is ready."""
        idle = [s for s in self.deployment.named("target") if s not in self.running]
        for service in idle[: max(0, count - len(self.running))]:
            self.running.append(service)
            self._do(self._started(service))
        while len(self.running) > count:
            self._do(self._stopped(self.running.pop()))

    async def settled(self) -> None:
        """Waits until every replica that was started or stopped is; raises what went wrong."""
        while self._tasks:
            tasks, self._tasks = self._tasks, set()
            await asyncio.gather(*tasks)

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(asyncio.create_task(work))

    async def _started(self, service: Service) -> None:
        service.launch()
        self._say()
        try:
            await service.ready()
        except RuntimeError:
            # One that was no longer wanted was stopped before it served.
            if service in self.running:
                raise
            return
        if service in self.running:
            self.ready.append(service.name)
            self._say()

    async def _stopped(self, service: Service) -> None:
        # A cluster takes a pod off the list and ends it at the same time.
        self.ready = [name for name in self.ready if name != service.name]
        self._say()
        self.exit_codes.append(await service.stop(signal.SIGTERM))
        self._say()

    def _say(self) -> None:
        self.deployment.write_targets(*self.ready)
        others = [s for s in self.deployment.services.values() if not s.name.startswith("target")]
        scraped = [*others, *(s for s in self.deployment.named("target") if s.is_running)]
        self.prometheus.scrape({service.name: service.metrics_port for service in scraped})


class Rule(Protocol):
    """Says how many replicas are wished for."""

    async def wish(self, pool: Pool) -> tuple[int, Mapping[str, float | None]]:
        """Returns the wish and the metrics that it goes by, None where one is not known."""
        ...


@dataclass(frozen=True, slots=True)
class ByQueries:
    """KEDA's external metrics: the queries of a rendered ScaledObject, and its fallback."""

    prometheus: Prometheus
    scaled_object: Mapping[str, Any]
    failures: dict[str, int] = field(default_factory=dict)

    async def wish(self, pool: Pool) -> tuple[int, Mapping[str, float | None]]:
        """Returns the wish and the queries' values."""
        current = len(pool.running)
        fallback = self.scaled_object["fallback"]
        wishes: list[int | None] = []
        values: dict[str, float | None] = {}
        for trigger in self.scaled_object["triggers"]:
            name, asked = trigger["name"], trigger["metadata"]
            try:
                values[name] = value = await self.prometheus.one(asked["query"])
            except Unanswered:
                values[name] = None
                self.failures[name] = self.failures.get(name, 0) + 1
                is_over = self.failures[name] > fallback["failureThreshold"]
                # currentReplicasIfHigher
                wishes.append(max(current, fallback["replicas"]) if is_over else None)
            else:
                self.failures[name] = 0
                wishes.append(by_average_value(value, float(asked["threshold"]), current))
        return of_metrics(wishes, current), values


@dataclass(slots=True)
class ByCpu:
    """A resource metric: each replica's CPU time over the time since the last look.

    A look comes right before the wish, as soon as metrics-server could have taken it.
    """

    wanted: float
    requested_cores: float
    _seen: dict[int, tuple[float, float]] = field(default_factory=dict)

    async def wish(self, pool: Pool) -> tuple[int, Mapping[str, float | None]]:
        """Returns the wish and the mean use."""
        used = [self._use(service) for service in pool.running]
        known = [use for use in used if use is not None]
        mean = sum(known) / len(known) if known else None
        return by_utilization(used, self.wanted), {"cpu": mean}

    def _use(self, service: Service) -> float | None:
        """Returns the share of what it requested, None where it was not looked at before."""
        assert service.process is not None
        times = psutil.Process(service.process.pid).cpu_times()
        now = times.user + times.system, time.monotonic()
        before = self._seen.get(service.process.pid)
        self._seen[service.process.pid] = now
        if before is None:
            return None
        return (now[0] - before[0]) / (now[1] - before[1]) / self.requested_cores


@dataclass(frozen=True, slots=True)
class Look:
    """One look of the autoscaler: what it saw, what it decided, and what served by then."""

    at_s: float
    values: Mapping[str, float | None]
    wished: int
    before: int
    replicas: int
    ready: int


async def autoscale(
    pool: Pool, rule: Rule, scaler: HorizontalAutoscaler, on_look: Callable[[Look], None]
) -> None:
    """Looks and resizes the pool, every `SYNC_S` seconds, until it is cancelled."""
    while True:
        next_s = time.monotonic() + SYNC_S
        wished, values = await rule.wish(pool)
        now_s, before = time.monotonic(), len(pool.running)
        count = scaler.replicas(wished, before, now_s)
        pool.resize(count)
        on_look(Look(now_s, values, wished, before, count, len(pool.ready)))
        await asyncio.sleep(max(0.0, next_s - time.monotonic()))
