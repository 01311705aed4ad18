"""Replaces the router while it serves: a new revision is loaded beside the old one, then swapped.

No call waits for a load and none fails because of one. A revision that cannot serve is refused
once, and shown: the one before it serves on.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields, replace
from typing import Final, Protocol

from arbitrage.core.errors import ArbitrageError
from arbitrage.core.ports import RouterDescription
from arbitrage.core.steps import ModelIdentity, Source, Step, Trajectory
from services.engines.base import Advantage, EngineStats, RouterEngine
from services.engines.loading import ModelLoadError
from services.engines.revisions import LocationUnreachable, RevisionError

_log = logging.getLogger(__name__)
_GAUGES: Final = frozenset(
    {"queued_requests", "running_requests", "cache_bytes", "cache_capacity_bytes"}
)
_STEP: Final = Step("1 + 1 = 2.", Source.DRAFT)
# Short, with a history of either writer, and long: what cannot judge these judges nothing.
_PROBES: Final = (
    (Trajectory("1 + 1?"), "2"),
    (Trajectory("1 + 1?", (_STEP, replace(_STEP, source=Source.TARGET))), "The answer is 2."),
    (Trajectory("How many? " * 40, (_STEP,) * 8), "So there are 2. " * 8),
)


class RouterSource(Protocol):
    """Where routers come from."""

    def latest(self) -> str:
        """Returns the revision that should serve.

        Raises:
            LocationUnreachable, RevisionError
        """
        ...

    def load(self, revision: str) -> RouterEngine:
        """Loads a revision.

        Raises:
            LocationUnreachable, RevisionError, ModelLoadError
        """
        ...


class ReloadCounts(Protocol):
    """Is told how looking for a new revision ended."""

    def count(self, result: str) -> None:
        """Counts an "ok", "rejected" or "unreachable"."""
        ...


@dataclass(frozen=True, slots=True)
class Rejection:
    """A revision that may not serve, and why."""

    revision: str
    reason: str


class _Lease:
    """One engine while calls run on it; it is closed when it was retired and the last has ended."""

    def __init__(self, engine: RouterEngine) -> None:
        self.engine = engine
        self._running_count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __enter__(self) -> RouterEngine:
        self._running_count += 1
        self._idle.clear()
        return self.engine

    def __exit__(self, *_: object) -> None:
        self._running_count -= 1
        if not self._running_count:
            self._idle.set()

    async def close(self) -> None:
        await self._idle.wait()
        await self.engine.close()


class ReloadingRouter:
    """Implements `RouterEngine` with the engine of the day."""

    def __init__(
        self,
        engine: RouterEngine,
        revision: str,
        source: RouterSource,
        in_thread: Callable[[Callable[[], RouterEngine]], Awaitable[RouterEngine]],
        counts: ReloadCounts,
    ) -> None:
        self._lease = _Lease(engine)
        self._source = source
        self._in_thread = in_thread
        self._counts = counts
        self._draining: list[RouterEngine] = []
        self._retired: EngineStats | None = None
        self.revision = revision
        self.rejection: Rejection | None = None

    @property
    def identity(self) -> ModelIdentity:
        """Names the weights that serve."""
        return self._lease.engine.identity

    @property
    def description(self) -> RouterDescription:
        """What the serving router says of itself, and which one could not replace it."""
        known = self._lease.engine.description
        if self.rejection is None:
            return known
        return replace(
            known,
            rejected_revision=self.rejection.revision,
            rejected_reason=self.rejection.reason,
        )

    @property
    def max_context_tokens(self) -> int:
        """Tokens that fit the serving model's context, and the cache."""
        return self._lease.engine.max_context_tokens

    def stats(self) -> EngineStats:
        """Returns what the engine is doing now; its counts include those of engines before it."""
        now = self._lease.engine.stats()
        for engine in self._draining:
            now = _added(engine.stats(), now)
        return now if self._retired is None else _added(self._retired, now)

    async def warm_up(self) -> None:
        """Judges one short step."""
        with self._lease as engine:
            await engine.warm_up()

    async def close(self) -> None:
        """Stops the model; calls still running end with `NotServing`."""
        await self._lease.engine.close()

    async def estimate_advantage(self, trajectory: Trajectory, draft_text: str) -> Advantage:
        """Returns the serving router's judgement.

        Raises:
            ContextTooLong, Overloaded, NotServing
        """
        with self._lease as engine:
            return await engine.estimate_advantage(trajectory, draft_text)

    async def reload(self, *, again: bool = False) -> None:
        """Looks for a new revision and swaps to it; returns when the old one is closed.

        One that was refused is not tried again unless it is asked for. Never raises for a bad
        revision or a place out of reach: both are counted, logged, and the serving router stays.
        """
        try:
            latest = await asyncio.to_thread(self._source.latest)
            if latest == self.revision:
                self.rejection = None
                return
            if not again and self.rejection is not None and self.rejection.revision == latest:
                return
        except LocationUnreachable as error:
            self._unreachable(error)
            return
        except RevisionError as error:
            self._reject("unknown", str(error))
            return
        try:
            engine = await self._validated(latest)
        except LocationUnreachable as error:
            self._unreachable(error)
        except (RevisionError, ModelLoadError, ArbitrageError, ValueError) as error:
            self._reject(latest, str(error))
        else:
            await self._swap(engine, latest)

    async def _validated(self, revision: str) -> RouterEngine:
        engine = await self._in_thread(lambda: self._source.load(revision))
        try:
            await engine.warm_up()
            for trajectory, candidate in _PROBES:
                score = (await engine.estimate_advantage(trajectory, candidate)).score.value
                if not (math.isfinite(score) and 0.0 <= score <= 1.0):
                    raise ValueError(f"it scores a probe {score}, which is no probability")
        except BaseException:
            await engine.close()
            raise
        return engine

    async def _swap(self, engine: RouterEngine, revision: str) -> None:
        old, before = self._lease, self.revision
        # Between two calls, and in one piece: nothing is awaited here.
        self._lease, self.revision, self.rejection = _Lease(engine), revision, None
        self._draining.append(old.engine)
        self._counts.count("ok")
        _log.info("router revision %s serves; it replaces %s", revision, before)
        await old.close()
        self._draining.remove(old.engine)
        stats = old.engine.stats()
        self._retired = stats if self._retired is None else _added(self._retired, stats)

    def _reject(self, revision: str, reason: str) -> None:
        known = self.rejection
        self.rejection = Rejection(revision, reason)
        if known == self.rejection:
            return
        self._counts.count("rejected")
        _log.error(
            "router revision %s is refused, %s serves on: %s", revision, self.revision, reason
        )

    def _unreachable(self, error: LocationUnreachable) -> None:
        self._counts.count("unreachable")
        _log.warning("%s; router revision %s serves on", error, self.revision)


def _added(retired: EngineStats, now: EngineStats) -> EngineStats:
    """Returns the counts of both; what is measured at a moment is that of `now`."""
    return EngineStats(
        **{
            field.name: getattr(now, field.name)
            + (0 if field.name in _GAUGES else getattr(retired, field.name))
            for field in fields(EngineStats)
        }
    )
