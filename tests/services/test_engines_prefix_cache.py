"""The prefix cache finds the longest known prefix and never holds more than it may."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from services.engines.prefix_cache import PrefixCache, as_tokens

_SEQUENCES = st.lists(st.integers(0, 2), min_size=1, max_size=12)


def _agreed(a: list[int], b: list[int]) -> int:
    count = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        count += 1
    return count


def _idle(cache: PrefixCache, tokens: list[int]) -> int:
    admission = cache.admit(as_tokens(tokens), 0, len(tokens))
    assert admission is not None
    cache.release(admission.entry_id, as_tokens(tokens), len(tokens))
    return admission.entry_id


@given(known=st.lists(_SEQUENCES, max_size=8), prompt=_SEQUENCES)
def test_the_reused_prefix_is_the_longest_there_is(
    known: list[list[int]], prompt: list[int]
) -> None:
    cache = PrefixCache(capacity_tokens=1000, min_copy_tokens=1)
    for tokens in known:
        _idle(cache, tokens)

    admission = cache.admit(as_tokens(prompt), len(prompt) - 1, len(prompt) + 4)

    assert admission is not None
    longest = max((_agreed(tokens, prompt) for tokens in known), default=0)
    assert admission.reused_count == min(longest, len(prompt) - 1)


class _Model:
    """Does to plain lists what the engine does to buffers."""

    def __init__(self, cache: PrefixCache) -> None:
        self.cache = cache
        self.live: dict[int, tuple[list[int], int]] = {}
        self.idle: dict[int, tuple[list[int], int]] = {}

    def admit(self, prompt: list[int], budget: int) -> None:
        limit = len(prompt) + budget
        admission = self.cache.admit(as_tokens(prompt), len(prompt) - 1, limit)
        if admission is None:
            held = sum(held for _, held in self.live.values())
            assert held + limit > self.cache.capacity_tokens
            return
        assert not set(admission.evicted_ids) & set(self.live)
        for entry_id in admission.evicted_ids:
            del self.idle[entry_id]
        if admission.source_id is not None:
            source = self.idle.get(admission.source_id) or self.live[admission.source_id]
            reused = source[0][: admission.reused_count]
            assert reused == prompt[: admission.reused_count]
            assert len(reused) == admission.reused_count < len(prompt)
        if admission.is_in_place:
            del self.idle[admission.entry_id]
        assert admission.limit_tokens >= limit
        self.live[admission.entry_id] = (prompt, admission.limit_tokens)
        self.cache.publish(admission.entry_id, as_tokens(prompt))

    def release(self, which: int, written: list[int]) -> None:
        entry_id = sorted(self.live)[which % len(self.live)]
        prompt, held = self.live.pop(entry_id)
        tokens = (prompt + written)[:held]
        kept = min(held, len(tokens) + which % 3)
        self.cache.release(entry_id, as_tokens(tokens), kept)
        self.idle[entry_id] = (tokens, kept)

    def check(self) -> None:
        held = sum(h for _, h in self.live.values()) + sum(h for _, h in self.idle.values())
        assert self.cache.held_tokens == held <= self.cache.capacity_tokens


@settings(max_examples=100)
@given(
    actions=st.lists(
        st.one_of(
            st.tuples(st.just("admit"), _SEQUENCES, st.integers(0, 6)),
            st.tuples(st.just("release"), _SEQUENCES, st.integers(0, 20)),
        ),
        max_size=25,
    ),
    capacity=st.integers(1, 60),
)
def test_the_bound_holds_and_entries_in_use_are_never_evicted(
    actions: list[tuple[str, list[int], int]], capacity: int
) -> None:
    model = _Model(PrefixCache(capacity, min_copy_tokens=2))
    for action, tokens, number in actions:
        if action == "admit":
            model.admit(tokens, number)
        elif model.live:
            model.release(number, tokens)
        model.check()


def test_an_idle_entry_that_the_prompt_extends_is_taken_over_in_place() -> None:
    cache = PrefixCache(100)
    entry_id = _idle(cache, [1, 2, 3])

    admission = cache.admit(as_tokens([1, 2, 3, 4]), 3, 8)

    assert admission is not None
    assert admission.is_in_place
    assert (admission.entry_id, admission.reused_count) == (entry_id, 3)
    assert cache.held_tokens == 8


def test_a_prompt_that_branches_off_copies_and_leaves_the_original() -> None:
    cache = PrefixCache(100, min_copy_tokens=2)
    entry_id = _idle(cache, [1, 2, 3, 9, 9])

    branch = cache.admit(as_tokens([1, 2, 3, 4]), 3, 4)
    again = cache.admit(as_tokens([1, 2, 3, 9, 9, 9]), 5, 6)

    assert branch is not None
    assert again is not None
    assert (branch.source_id, branch.reused_count, branch.is_in_place) == (entry_id, 3, False)
    assert (again.source_id, again.reused_count, again.is_in_place) == (entry_id, 5, True)


def test_a_tail_that_is_short_beside_a_long_prefix_is_given_up_for_it() -> None:
    cache = PrefixCache(1000, most_lost_tokens=10)
    prefix = list(range(160))
    entry_id = _idle(cache, [*prefix, *[999] * 10])

    rejected = cache.admit(as_tokens([*prefix, 7]), 160, 170)

    assert rejected is not None
    assert (rejected.entry_id, rejected.reused_count) == (entry_id, 160)
    assert rejected.is_in_place


def test_a_tail_that_is_long_by_itself_or_beside_its_prefix_is_left() -> None:
    for prefix_count, tail_count in ((160, 11), (70, 10)):
        cache = PrefixCache(1000, most_lost_tokens=10)
        prefix = list(range(prefix_count))
        _idle(cache, [*prefix, *[999] * tail_count])

        branch = cache.admit(as_tokens([*prefix, 7]), prefix_count, prefix_count + 10)

        assert branch is not None
        assert branch.reused_count == prefix_count
        assert not branch.is_in_place


def test_a_short_common_start_is_not_worth_a_copy() -> None:
    cache = PrefixCache(100, min_copy_tokens=4)
    _idle(cache, [1, 2, 3, 9])

    admission = cache.admit(as_tokens([1, 2, 3, 4]), 3, 4)

    assert admission is not None
    assert admission.reused_count == 0


def test_an_entry_in_use_can_be_copied_but_not_taken_over() -> None:
    cache = PrefixCache(100, min_copy_tokens=2)
    first = cache.admit(as_tokens([1, 2, 3]), 2, 10)
    assert first is not None
    cache.publish(first.entry_id, as_tokens([1, 2, 3]))

    second = cache.admit(as_tokens([1, 2, 3, 4]), 3, 10)

    assert second is not None
    assert (second.source_id, second.reused_count) == (first.entry_id, 3)
    assert not second.is_in_place


def test_without_room_for_a_copy_the_common_part_is_kept_and_the_tail_given_up() -> None:
    cache = PrefixCache(6, min_copy_tokens=2)
    entry_id = _idle(cache, [1, 2, 3, 9, 9])

    admission = cache.admit(as_tokens([1, 2, 3, 4]), 3, 6)

    assert admission is not None
    assert admission.is_in_place
    assert (admission.entry_id, admission.reused_count) == (entry_id, 3)


def test_the_least_recently_used_entry_goes_first() -> None:
    cache = PrefixCache(9)
    old, new = _idle(cache, [1, 1, 1, 1]), _idle(cache, [2, 2, 2, 2])
    _touch = cache.admit(as_tokens([1, 1, 1, 1]), 3, 4)
    assert _touch is not None
    cache.release(_touch.entry_id, as_tokens([1, 1, 1, 1]), 4)

    admission = cache.admit(as_tokens([3, 3]), 1, 5)

    assert old == _touch.entry_id
    assert admission is not None
    assert admission.evicted_ids == (new,)
