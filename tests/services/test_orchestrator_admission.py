"""Admission: who runs, who waits, who is sent away."""

from __future__ import annotations

import asyncio
import time

import pytest

from arbitrage.core.errors import DeadlineExceeded, Overloaded
from services.orchestrator.admission import Admission


async def hold(admission: Admission, order: list[int], number: int, end: asyncio.Event) -> None:
    """Takes a place, notes it, and keeps it until `end`."""
    async with admission.place():
        order.append(number)
        await end.wait()


async def test_places_are_given_in_the_order_of_arrival() -> None:
    admission, order, end = Admission(1, 9), list[int](), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(hold(admission, order, number, end))
        await asyncio.sleep(0)
        assert (admission.running_count, admission.waiting_count) == (1, 3)
        assert order == [0]
        end.set()
    assert order == [0, 1, 2, 3]
    assert (admission.running_count, admission.waiting_count) == (0, 0)


async def test_one_too_many_is_sent_away_at_once_and_told_when_to_return() -> None:
    admission, end = Admission(2, 1), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for number in range(3):
            group.create_task(hold(admission, [], number, end))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="ARBITRAGE_MAX_QUEUE") as raised:
            async with admission.place():
                raise AssertionError("it was let in")
        assert 0.1 <= raised.value.retry_after_s <= 60.0
        end.set()


async def test_who_waits_for_a_place_does_so_within_its_own_time() -> None:
    admission = Admission(1, 1)
    async with admission.place():
        with pytest.raises(DeadlineExceeded):
            async with admission.place(time.monotonic() + 0.01):
                raise AssertionError("it was let in")
        assert admission.waiting_count == 0
    async with admission.place(time.monotonic() + 60.0):
        assert admission.running_count == 1


async def test_without_a_queue_only_a_free_place_is_given() -> None:
    admission = Admission(1, 0)
    async with admission.place():
        with pytest.raises(Overloaded):
            async with admission.place():
                raise AssertionError("it was let in")
    async with admission.place():
        assert admission.running_count == 1


async def test_who_stops_waiting_leaves_its_place_to_others() -> None:
    admission, end = Admission(1, 1), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(hold(admission, [], 0, end))
        await asyncio.sleep(0)
        waiting = group.create_task(hold(admission, [], 1, end))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.sleep(0)
        assert admission.waiting_count == 0
        end.set()
    async with admission.place():
        assert admission.running_count == 1
