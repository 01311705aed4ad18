"""Decides whose keys and values a request may start from, and whose are given up for it.

This is bookkeeping only: it counts tokens and knows no tensor. Each entry stands for the buffers
of one sequence, in use or idle; together they never hold more than the capacity.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import count

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


def as_tokens(token_ids: list[int]) -> Tokens:
    """Returns token ids in the form this module compares."""
    return np.asarray(token_ids, dtype=np.int32)


def common_prefix_length(a: Tokens, b: Tokens) -> int:
    """Counts the leading tokens that agree.

    >>> common_prefix_length(as_tokens([1, 2, 3]), as_tokens([1, 2, 9, 9]))
    2
    """
    shorter = min(len(a), len(b))
    differs = a[:shorter] != b[:shorter]
    return int(differs.argmax()) if differs.any() else shorter


@dataclass(frozen=True, slots=True)
class Admission:
    """Where a request's keys and values come from.

    `reused_count` tokens are known: those of `source_id`, copied into the new entry `entry_id`,
    or taken over in place where both are the same. The buffers of `evicted_ids` are to be freed.
    """

    entry_id: int
    limit_tokens: int
    reused_count: int = 0
    source_id: int | None = None
    evicted_ids: tuple[int, ...] = ()

    @property
    def is_in_place(self) -> bool:
        """Whether an idle entry becomes the request's own."""
        return self.source_id == self.entry_id


@dataclass(slots=True)
class _Entry:
    held_tokens: int
    is_idle: bool = False
    tokens: Tokens = field(default_factory=lambda: as_tokens([]))


class PrefixCache:
    """Remembers computed sequences, the least recently used first to go.

    `capacity_tokens` bounds what all entries hold, in use or idle; `min_copy_tokens` is the
    shortest common prefix that is worth a copy. An idle entry gives its tail up and is taken
    over where that is short beside the common part, and no longer than `most_lost_tokens`: a
    rejected step is computed again sooner than a long prefix is copied. Idle entries go, too,
    where there would be more than `max_entries`: each lookup goes through all of them.
    """

    def __init__(
        self,
        capacity_tokens: int,
        min_copy_tokens: int = 8,
        max_entries: int = 256,
        most_lost_tokens: int = 64,
    ) -> None:
        self.capacity_tokens = capacity_tokens
        self._min_copy_tokens = min_copy_tokens
        self._max_entries = max_entries
        self._most_lost_tokens = most_lost_tokens
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._ids = count()
        self._held_tokens = 0

    @property
    def held_tokens(self) -> int:
        """Tokens that all entries hold room for."""
        return self._held_tokens

    def admit(self, prompt: Tokens, reusable_count: int, limit_tokens: int) -> Admission | None:
        """Makes room for a sequence of up to `limit_tokens` tokens that starts with `prompt`.

        At most `reusable_count` known tokens are used; the rest is wanted anew. Returns None
        where the entries in use leave no room now.
        """
        source_id, reused_count = self._longest_prefix(prompt, reusable_count)
        admission: Admission | None = None
        if source_id is not None:
            source = self._entries[source_id]
            agreed_count = common_prefix_length(source.tokens, prompt)
            lost_count = len(source.tokens) - agreed_count
            if source.is_idle and lost_count <= min(agreed_count // 8, self._most_lost_tokens):
                admission = self._take_over(source_id, reused_count, limit_tokens)
            elif reused_count >= self._min_copy_tokens:
                admission = self._start(limit_tokens, source_id, reused_count)
                if admission is None and source.is_idle:
                    # No room for a copy: better lose the source's tail than the common part.
                    admission = self._take_over(source_id, reused_count, limit_tokens)
        return admission or self._start(limit_tokens, None, 0)

    def publish(self, entry_id: int, tokens: Tokens) -> None:
        """Says which tokens an entry in use has computed, so that others may copy them."""
        self._entries[entry_id].tokens = tokens

    def release(self, entry_id: int, tokens: Tokens, held_tokens: int) -> None:
        """Makes an entry idle: it has computed `tokens` in buffers for `held_tokens`."""
        entry = self._entries[entry_id]
        assert not entry.is_idle, entry_id
        assert len(tokens) <= held_tokens <= entry.held_tokens, (held_tokens, entry.held_tokens)
        self._held_tokens += held_tokens - entry.held_tokens
        entry.held_tokens, entry.tokens, entry.is_idle = held_tokens, tokens, True
        self._entries.move_to_end(entry_id)

    def discard(self, entry_id: int) -> None:
        """Forgets an entry."""
        self._held_tokens -= self._entries.pop(entry_id).held_tokens

    def _longest_prefix(self, prompt: Tokens, reusable_count: int) -> tuple[int | None, int]:
        best_id, best_count = None, 0
        # The latest first: it is mostly the one, and then the others are soon passed over.
        for entry_id, entry in reversed(self._entries.items()):
            # An entry beats the best only if it agrees where the best one ends.
            if len(entry.tokens) < best_count or best_count >= reusable_count:
                continue
            if best_count and entry.tokens[best_count - 1] != prompt[best_count - 1]:
                continue
            agreed = min(common_prefix_length(entry.tokens, prompt), reusable_count)
            if agreed > best_count:
                best_id, best_count = entry_id, agreed
        return best_id, best_count

    def _take_over(self, entry_id: int, reused_count: int, limit_tokens: int) -> Admission | None:
        entry = self._entries[entry_id]
        limit_tokens = max(limit_tokens, entry.held_tokens)
        evicted = self._make_room(limit_tokens - entry.held_tokens, spared_id=entry_id)
        if evicted is None:
            return None
        self._held_tokens += limit_tokens - entry.held_tokens
        entry.held_tokens, entry.is_idle = limit_tokens, False
        entry.tokens = entry.tokens[:reused_count]
        return Admission(entry_id, limit_tokens, reused_count, entry_id, evicted)

    def _start(
        self, limit_tokens: int, source_id: int | None, reused_count: int
    ) -> Admission | None:
        evicted = self._make_room(limit_tokens, spared_id=source_id, new_count=1)
        if evicted is None:
            return None
        if source_id is not None:
            self._entries.move_to_end(source_id)
        entry_id = next(self._ids)
        self._entries[entry_id] = _Entry(limit_tokens)
        self._held_tokens += limit_tokens
        return Admission(entry_id, limit_tokens, reused_count, source_id, evicted)

    def _make_room(
        self, token_count: int, spared_id: int | None, new_count: int = 0
    ) -> tuple[int, ...] | None:
        """Evicts idle entries until `token_count` fits; None, and nothing done, if it cannot.

        Does the same for the count of entries, but those in use may exceed it.
        """
        excess = self._held_tokens + token_count - self.capacity_tokens
        excess_count = len(self._entries) + new_count - self._max_entries
        evicted: list[int] = []
        for entry_id, entry in self._entries.items():
            if excess <= 0 and excess_count <= 0:
                break
            if entry.is_idle and entry_id != spared_id:
                evicted.append(entry_id)
                excess -= entry.held_tokens
                excess_count -= 1
        if excess > 0:
            return None
        for entry_id in evicted:
            self.discard(entry_id)
        return tuple(evicted)
