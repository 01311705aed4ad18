"""Lets in as many requests as can run well, keeps a few waiting, and shares both between tenants.

A free place goes to the waiting tenant that holds the fewest, in turn where several hold equally
few; within a tenant, first come, first served. Where too many wait, the tenant with the most of
them loses its newest. So a tenant that floods an orchestrator waits behind itself.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import assert_never

from arbitrage.core.errors import DeadlineExceeded, Overloaded
from arbitrage.core.ports import Clock

_RECENT_WEIGHT = 0.2
_LEAST_RETRY_S = 0.1
_LONGEST_RETRY_S = 60.0


class Outcome(Enum):
    """What became of a request that asked for a place."""

    ADMITTED = "admitted"
    REFUSED = "refused"
    PUSHED_OUT = "pushed_out"
    EXPIRED = "expired"


# Is told each outcome and the seconds it was waited for.
Observer = Callable[[Outcome, float], None]


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    """One request. `turn` ends its wait, well or not."""

    tenant: str
    most_places: int
    turn: asyncio.Future[Outcome]


@dataclass(slots=True)
class _Tenant:
    running_count: int = 0
    waiting: deque[_Request] = field(default_factory=deque)

    @property
    def may_run(self) -> bool:
        """Whether its oldest waiting request may take a place."""
        return bool(self.waiting) and self.running_count < self.waiting[0].most_places


class Admission:
    """Bounds how many requests run and how many wait.

    `max_share` is the share of the places, and of the queue, that one tenant may hold; it gets one
    in any case. Below 1 a newcomer finds room in the queue, and nobody who waits is sent away.
    """

    def __init__(
        self,
        max_concurrency: int,
        max_queue: int,
        max_share: float = 1.0,
        observe: Observer = lambda outcome, waited_s: None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._max_concurrency = max_concurrency
        self._max_queue = max_queue
        # In floats, 0.29 of 100 places are a little less than 29.
        self._most_places = max(1, int(max_share * max_concurrency + 1e-9))
        self._most_waiting = max(1, int(max_share * max_queue + 1e-9))
        self._observe = observe
        self._clock = clock
        # Only those that have requests; who was given a place last comes last.
        self._tenants: dict[str, _Tenant] = {}
        self._started_s: dict[_Request, float] = {}
        self._mean_s = 1.0

    @property
    def running_count(self) -> int:
        """Requests that hold a place."""
        return len(self._started_s)

    @property
    def waiting_count(self) -> int:
        """Requests that wait for one."""
        return sum(len(tenant.waiting) for tenant in self._tenants.values())

    @asynccontextmanager
    async def place(
        self, tenant: str, deadline_s: float | None = None, max_concurrency: int | None = None
    ) -> AsyncIterator[None]:
        """Waits for a place and holds it; `deadline_s` is a moment of the monotonic clock.

        `max_concurrency` is the most places that the tenant may hold with this one.

        Raises:
            DeadlineExceeded: there was no place by then.
            Overloaded: too many are waiting, and of them too many are this tenant's.
        """
        most_places = self._most_places
        if max_concurrency is not None:
            most_places = min(most_places, max_concurrency)
        turn = asyncio.get_running_loop().create_future()
        request = _Request(tenant, most_places, turn)
        await self._wait(request, deadline_s)
        try:
            yield
        finally:
            took_s = self._clock() - self._started_s[request]
            self._mean_s += _RECENT_WEIGHT * (took_s - self._mean_s)
            self._leave(request)

    async def _wait(self, request: _Request, deadline_s: float | None) -> None:
        arrived_s = self._clock()
        tenant = self._tenants.setdefault(request.tenant, _Tenant())
        tenant.waiting.append(request)
        self._hand_out()
        if len(tenant.waiting) > self._most_waiting:
            self._send_away(request.tenant, request)
        elif self.waiting_count > self._max_queue:
            self._send_away(self._most_present(request.tenant), request)
        try:
            async with asyncio.timeout(None if deadline_s is None else deadline_s - arrived_s):
                outcome = await request.turn
        except TimeoutError:
            outcome = Outcome.EXPIRED
            self._leave(request)
        except asyncio.CancelledError:
            self._leave(request)
            raise
        self._observe(outcome, self._clock() - arrived_s)
        match outcome:
            case Outcome.ADMITTED:
                return
            case Outcome.EXPIRED:
                raise DeadlineExceeded("the time limit was over before there was a place")
            case Outcome.REFUSED | Outcome.PUSHED_OUT:
                raise self._overloaded(request)
            case _:
                assert_never(outcome)

    def _hand_out(self, giver: str | None = None) -> None:
        """Gives free places to those whose turn it is; `giver` has just left one."""
        while self.running_count < self._max_concurrency:
            ready = [name for name, tenant in self._tenants.items() if tenant.may_run]
            if not ready:
                return
            # Among equals, not to the giver again: with one place, tenants alternate.
            name = min(ready, key=lambda name: (self._tenants[name].running_count, name == giver))
            tenant = self._tenants[name] = self._tenants.pop(name)
            request = tenant.waiting.popleft()
            if not request.turn.done():
                tenant.running_count += 1
                self._started_s[request] = self._clock()
                request.turn.set_result(Outcome.ADMITTED)

    def _most_present(self, arriving: str) -> str:
        """Returns the tenant that has the most waiting, where `arriving` has just come."""
        # Among equals it is who has more running; among those, the arriving one: where many
        # tenants wait with one request each, none loses its turn to a newcomer.
        return max(
            self._tenants,
            key=lambda name: (
                len(self._tenants[name].waiting),
                self._tenants[name].running_count,
                name == arriving,
            ),
        )

    def _send_away(self, name: str, arriving: _Request) -> None:
        """Ends the wait of a tenant's newest request."""
        request = self._tenants[name].waiting.pop()
        if not request.turn.done():
            is_arriving = request is arriving
            request.turn.set_result(Outcome.REFUSED if is_arriving else Outcome.PUSHED_OUT)
        self._forget_if_idle(name)

    def _leave(self, request: _Request) -> None:
        """Takes a request out, whether it runs or waits, and lets others in."""
        tenant = self._tenants.get(request.tenant)
        if tenant is None:
            # It was sent away and cancelled in the same moment.
            return
        if self._started_s.pop(request, None) is not None:
            tenant.running_count -= 1
        elif request in tenant.waiting:
            tenant.waiting.remove(request)
        # Also after one that waited: it may have held up those behind it by its own bound.
        self._hand_out(giver=request.tenant)
        self._forget_if_idle(request.tenant)

    def _forget_if_idle(self, name: str) -> None:
        tenant = self._tenants[name]
        if not tenant.running_count and not tenant.waiting:
            del self._tenants[name]

    def _overloaded(self, request: _Request) -> Overloaded:
        own = self._tenants.get(request.tenant, _Tenant())
        return Overloaded(
            f"{self.running_count} requests are running and {self.waiting_count} waiting, "
            f"{own.running_count} and {len(own.waiting)} of them this tenant's; come back later, "
            "or raise ARBITRAGE_MAX_CONCURRENCY, ARBITRAGE_MAX_QUEUE or ARBITRAGE_TENANT_MAX_SHARE",
            retry_after_s=self._retry_after_s(request, len(own.waiting)),
        )

    def _retry_after_s(self, request: _Request, own_waiting_count: int) -> float:
        """Returns when the request would have had its place, behind its tenant's others."""
        now_s = self._clock()
        ages_s = [now_s - started_s for started_s in self._started_s.values()]
        # Those that have ended say little once those that run take longer than they did.
        solution_s = max(self._mean_s, sum(ages_s) / max(1, len(ages_s)))
        tenant_count = len(self._tenants.keys() | {request.tenant})
        places = min(request.most_places, self._max_concurrency / tenant_count)
        wait_s = solution_s * (own_waiting_count + 1) / places
        return min(_LONGEST_RETRY_S, max(_LEAST_RETRY_S, wait_s))
