"""The store in memory: it keeps what fits, for as long as it should."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.orchestrator.store import MemoryStore
from tests.fakes import FakeClock

ROOM_FOR_TWO = 2 * (300 + 1 + 10)


async def test_what_was_put_is_found_until_it_is_too_old() -> None:
    clock = FakeClock()
    store = MemoryStore(1000, clock)
    store.put(b"a", b"1", ttl_s=10.0)
    clock.now_s = 9.9
    assert await store.find(b"a") == b"1"
    clock.now_s = 10.0
    assert await store.find(b"a") is None
    assert store.size_bytes == 0


async def test_the_least_recently_used_goes_first() -> None:
    store = MemoryStore(ROOM_FOR_TWO)
    store.put(b"a", b"0123456789", 60.0)
    store.put(b"b", b"0123456789", 60.0)
    assert await store.find(b"a") is not None
    store.put(b"c", b"0123456789", 60.0)
    assert await store.find(b"b") is None
    assert await store.find(b"a") is not None
    assert await store.find(b"c") is not None


async def test_what_is_larger_than_the_bound_is_not_kept() -> None:
    store = MemoryStore(ROOM_FOR_TWO)
    store.put(b"a", b"0", 60.0)
    store.put(b"b", b"0" * 1000, 60.0)
    assert await store.find(b"b") is None
    assert await store.find(b"a") == b"0"


async def test_a_key_put_again_holds_the_newer_value() -> None:
    store = MemoryStore(ROOM_FOR_TWO)
    store.put(b"a", b"old", 60.0)
    store.put(b"a", b"newer", 60.0)
    assert await store.find(b"a") == b"newer"
    assert store.size_bytes == 300 + 1 + 5


@given(st.lists(st.tuples(st.binary(max_size=2), st.binary(max_size=500)), max_size=40))
async def test_the_bound_always_holds(puts: list[tuple[bytes, bytes]]) -> None:
    store = MemoryStore(2000)
    for key, value in puts:
        store.put(key, value, 60.0)
        assert 0 <= store.size_bytes <= 2000
