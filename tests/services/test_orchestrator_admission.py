"""Admission: who runs, who waits, who is sent away."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from arbitrage.core.errors import DeadlineExceeded, Overloaded
from services.orchestrator.admission import Admission
from services.orchestrator.telemetry import AdmissionMetrics
from tests.fakes import FakeClock


@dataclass
class Crowd:
    """Requests of some tenants that hold their places until they are told to end."""

    admission: Admission
    group: asyncio.TaskGroup
    order: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    waiting: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    running: dict[str, asyncio.Event] = field(default_factory=dict)

    async def arrives(
        self, name: str, max_concurrency: int | None = None, deadline_s: float | None = None
    ) -> None:
        """Lets a request come; the first letter of its name is its tenant."""
        self.waiting[name] = self.group.create_task(self._hold(name, max_concurrency, deadline_s))
        await settled()

    async def ends(self, name: str) -> None:
        """Lets a running request end."""
        self.running.pop(name).set()
        await settled()

    async def gives_up(self, name: str) -> None:
        """Cancels a waiting request."""
        self.waiting.pop(name).cancel()
        await settled()

    async def _hold(self, name: str, most: int | None, deadline_s: float | None) -> None:
        try:
            async with self.admission.place(name[0], deadline_s, most):
                del self.waiting[name]
                self.order.append(name)
                self.running[name] = asyncio.Event()
                await self.running[name].wait()
        except Overloaded:
            del self.waiting[name]
            self.refused.append(name)


async def settled() -> None:
    """Lets everybody do what there is to do now."""
    for _ in range(5):
        await asyncio.sleep(0)


@asynccontextmanager
async def crowd(admission: Admission) -> AsyncIterator[Crowd]:
    """Makes a crowd, and lets all of it end when the block does."""
    async with asyncio.TaskGroup() as group:
        made = Crowd(admission, group)
        yield made
        while made.running or made.waiting:
            for name in list(made.running):
                await made.ends(name)
    assert (admission.running_count, admission.waiting_count) == (0, 0)


async def test_a_tenants_requests_are_let_in_in_the_order_of_arrival() -> None:
    async with crowd(Admission(1, 9)) as people:
        for name in ("a0", "a1", "a2", "a3"):
            await people.arrives(name)
        assert (people.admission.running_count, people.admission.waiting_count) == (1, 3)
        assert people.order == ["a0"]
    assert people.order == ["a0", "a1", "a2", "a3"]


async def test_one_too_many_is_sent_away_at_once_and_told_when_to_return() -> None:
    async with crowd(Admission(2, 1)) as people:
        for name in ("a0", "a1", "a2"):
            await people.arrives(name)
        with pytest.raises(Overloaded, match="ARBITRAGE_MAX_QUEUE") as raised:
            async with people.admission.place("a"):
                raise AssertionError("it was let in")
        assert 0.1 <= raised.value.retry_after_s <= 60.0


async def test_who_waits_for_a_place_does_so_within_its_own_time() -> None:
    admission = Admission(1, 1)
    async with admission.place("a"):
        with pytest.raises(DeadlineExceeded):
            async with admission.place("a", time.monotonic() + 0.01):
                raise AssertionError("it was let in")
        assert admission.waiting_count == 0
    async with admission.place("a", time.monotonic() + 60.0):
        assert admission.running_count == 1


async def test_without_a_queue_only_a_free_place_is_given() -> None:
    admission = Admission(1, 0)
    async with admission.place("a"):
        for tenant in ("a", "b"):
            with pytest.raises(Overloaded):
                async with admission.place(tenant):
                    raise AssertionError("it was let in")
    async with admission.place("a"):
        assert admission.running_count == 1


async def test_who_stops_waiting_leaves_its_place_to_others() -> None:
    async with crowd(Admission(1, 1)) as people:
        await people.arrives("a0")
        await people.arrives("a1")
        await people.gives_up("a1")
        assert people.admission.waiting_count == 0
        await people.arrives("a2")
        assert people.refused == []


@pytest.mark.parametrize("moments", range(6))
async def test_who_gives_up_as_its_turn_comes_leaves_its_place_to_the_next(moments: int) -> None:
    async with crowd(Admission(1, 9)) as people:
        for name in ("a0", "b0", "c0"):
            await people.arrives(name)
        gone = people.waiting["b0"]
        people.running.pop("a0").set()
        for _ in range(moments):
            await asyncio.sleep(0)
        gone.cancel()
        await settled()
        assert people.admission.running_count == 1
        assert people.order[-1] == "c0"
        for names in (people.waiting, people.running):
            names.pop("b0", None)


async def test_tenants_that_have_gone_are_forgotten() -> None:
    clock = FakeClock()
    admission = Admission(1, 0, clock=clock)
    for number in range(100):
        async with admission.place(f"tenant {number}"):
            clock.now_s += 1.0
    async with admission.place("a"):
        with pytest.raises(Overloaded) as raised:
            async with admission.place("a"):
                raise AssertionError("it was let in")
    # With others about, its part of the places would be smaller, and the wait longer.
    assert raised.value.retry_after_s == pytest.approx(1.0)


@pytest.mark.parametrize("places", [1, 2, 4])
async def test_a_quiet_tenant_is_next_however_many_requests_another_one_sends(places: int) -> None:
    async with crowd(Admission(places, 100)) as people:
        for number in range(places + 20):
            await people.arrives(f"a{number}")
        await people.arrives("b0")
        await people.ends("a0")
        assert people.order[-1] == "b0"


async def test_a_free_place_goes_to_the_tenant_that_holds_the_fewest() -> None:
    async with crowd(Admission(4, 100)) as people:
        for name in ("a0", "a1", "a2", "b0", "a3", "b1", "b2"):
            await people.arrives(name)
        await people.ends("a0")
        assert people.order[-1] == "b1"
        # Two each now; what one of them ends, the other one does not get.
        await people.ends("b0")
        assert people.order[-1] == "b2"


async def test_tenants_that_hold_equally_many_take_turns() -> None:
    async with crowd(Admission(1, 100)) as people:
        for name in ("a0", "a1", "a2", "b0", "b1", "c0", "c1"):
            await people.arrives(name)
    assert people.order == ["a0", "b0", "a1", "c0", "b1", "a2", "c1"]


async def test_a_tenant_that_comes_again_and_again_does_not_overtake_those_that_wait() -> None:
    async with crowd(Admission(1, 100)) as people:
        for name in ("b0", "c0", "a0", "a1"):
            await people.arrives(name)
        for number in range(4):
            for tenant in ("b", "c"):
                if (running := f"{tenant}{number}") in people.running:
                    await people.ends(running)
                    await people.arrives(f"{tenant}{number + 1}")
        assert "a0" in people.order


async def test_a_full_queue_loses_the_newest_of_the_tenant_that_fills_it() -> None:
    async with crowd(Admission(1, 3)) as people:
        for name in ("a0", "a1", "a2", "a3"):
            await people.arrives(name)
        await people.arrives("a4")
        assert people.refused == ["a4"]
        await people.arrives("b0")
        assert people.refused == ["a4", "a3"]
        assert list(people.waiting) == ["a1", "a2", "b0"]


async def test_a_queue_of_one_is_not_locked_by_who_holds_the_place() -> None:
    async with crowd(Admission(1, 1)) as people:
        for name in ("a0", "a1", "b0"):
            await people.arrives(name)
        assert people.refused == ["a1"]
        # But among those that hold nothing, who came first stays.
        await people.arrives("c0")
        assert people.refused == ["a1", "c0"]


async def test_a_tenant_keeps_to_the_bound_of_its_key_while_places_are_free() -> None:
    async with crowd(Admission(3, 100)) as people:
        for name in ("a0", "a1"):
            await people.arrives(name, max_concurrency=1)
        await people.arrives("b0")
        assert people.order == ["a0", "b0"]
        # One key's bound is no other key's; but within a tenant nobody overtakes.
        await people.arrives("a2", max_concurrency=2)
        assert list(people.waiting) == ["a1", "a2"]
        await people.gives_up("a1")
        assert people.order == ["a0", "b0", "a2"]


@pytest.mark.parametrize(
    ("share", "places", "held"), [(1.0, 4, 4), (0.75, 4, 3), (0.01, 4, 1), (0.29, 100, 29)]
)
async def test_no_tenant_holds_more_than_its_share_even_alone(
    share: float, places: int, held: int
) -> None:
    async with crowd(Admission(places, 200, share)) as people:
        for number in range(places + 1):
            await people.arrives(f"a{number}")
        assert people.admission.running_count == held
        await people.arrives("b0")
        assert ("b0" in people.running) == (held < places)


async def test_a_flood_leaves_its_share_of_the_queue_free_and_is_refused_on_arrival() -> None:
    async with crowd(Admission(1, 4, 0.5)) as people:
        for name in ("a0", "a1", "a2", "a3"):
            await people.arrives(name)
        assert (list(people.waiting), people.refused) == (["a1", "a2"], ["a3"])
        for name in ("b0", "b1", "b2"):
            await people.arrives(name)
        # Nobody who waited was sent away for them.
        assert list(people.waiting) == ["a1", "a2", "b0", "b1"]
        assert people.refused == ["a3", "b2"]


async def test_the_longer_solutions_take_the_later_one_is_told_to_return() -> None:
    clock = FakeClock()
    admission = Admission(2, 1, clock=clock)

    async def told() -> float:
        with pytest.raises(Overloaded) as raised:
            async with admission.place("a"):
                raise AssertionError("it was let in")
        return raised.value.retry_after_s

    async with crowd(admission) as people:
        for name in ("a0", "a1", "a2"):
            await people.arrives(name)
        # One waits before it and two run at once: its turn is in about a solution's time.
        assert await told() == 1.0
        # None has ended yet, but those that run take longer than was thought.
        clock.now_s = 8.0
        assert await told() == 8.0
        await people.arrives("b0")
        # Half of the places are its own now.
        assert people.refused == ["a2"]
        assert await told() == 8.0


async def test_what_becomes_of_requests_is_counted() -> None:
    registry = CollectorRegistry()
    metrics = AdmissionMetrics(registry)

    def counted() -> dict[str, float | None]:
        return {
            result: registry.get_sample_value("arbitrage_admissions_total", {"result": result})
            for result in ("admitted", "refused", "pushed_out", "expired")
        }

    assert set(counted().values()) == {0}
    async with crowd(Admission(1, 2, observe=metrics.observe)) as people:
        for name in ("a0", "a1", "a2", "a3", "b0"):
            await people.arrives(name)
        await people.gives_up("a1")
        with pytest.raises(DeadlineExceeded):
            async with people.admission.place("c", time.monotonic()):
                raise AssertionError("it was let in")
    assert counted() == {"admitted": 2, "refused": 1, "pushed_out": 1, "expired": 1}
    assert registry.get_sample_value("arbitrage_admission_wait_seconds_count") == 2


Move = tuple[str, int]


@given(
    st.integers(1, 4),
    st.integers(0, 5),
    st.sampled_from([0.4, 0.8, 1.0]),
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "c", "end", "give up", "both"]), st.integers(0, 9)),
        max_size=60,
    ),
)
@settings(max_examples=150, deadline=None)
def test_whatever_happens_the_bounds_hold_and_no_place_stays_empty(
    places: int, queue: int, share: float, moves: list[Move]
) -> None:
    asyncio.run(play(places, queue, share, moves))


async def play(places: int, queue: int, share: float, moves: list[Move]) -> None:
    """Lets requests come, end and give up, and looks at the bounds after each move."""
    own_bound = max(1, int(share * places))
    async with crowd(Admission(places, queue, share)) as people:
        for number, (move, which) in enumerate(moves):
            running, waiting = list(people.running), list(people.waiting)
            if move in "abc":
                await people.arrives(f"{move}{number}", max_concurrency=1 + which % 4)
            if move in ("end", "both") and running:
                people.running.pop(running[which % len(running)]).set()
            if move in ("give up", "both") and waiting:
                # In the very moment in which its turn may come.
                people.waiting.pop(waiting[which % len(waiting)]).cancel()
            await settled()
            counts = Counter(name[0] for name in people.running)
            assert people.admission.running_count == len(people.running) <= places
            assert people.admission.waiting_count == len(people.waiting) <= queue
            assert max(counts.values(), default=0) <= own_bound
            if not people.waiting:
                continue
            # Whoever waits does so for a reason: all is taken, or its tenant holds what it may.
            held_least = {name[0]: counts[name[0]] for name in people.waiting}
            assert len(people.running) == places or min(held_least.values()) >= 1


@given(st.integers(1, 4), st.lists(st.integers(0, 9), min_size=30, max_size=60))
@settings(max_examples=50, deadline=None)
def test_a_quiet_tenant_between_two_that_flood_is_never_refused_and_soon_let_in(
    places: int, choices: list[int]
) -> None:
    asyncio.run(starve(places, choices))


async def starve(places: int, choices: list[int]) -> None:
    """Floods from two tenants, and has a third come in between with one request at a time."""
    async with crowd(Admission(places, 6)) as people:
        quiet = None
        for number, choice in enumerate(choices):
            await people.arrives(f"a{number}")
            await people.arrives(f"b{number}")
            if quiet is None:
                quiet = f"c{number}"
                await people.arrives(quiet)
                seen = len(people.order)
            running = list(people.running)
            await people.ends(running[choice % len(running)])
            assert quiet not in people.refused
            if quiet in people.order:
                others = Counter(name[0] for name in people.order[seen:])
                assert max(others["a"], others["b"]) <= 2
                if quiet in people.running:
                    await people.ends(quiet)
                quiet = None
