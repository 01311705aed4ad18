"""What orchestrators keep beside the requests they run: answers of models, by prefix."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

from arbitrage.core.ports import Clock

# Python's own memory for an entry of the dictionary, key and objects included.
_ENTRY_BYTES = 300


class Store(Protocol):
    """Keeps bytes by key for a while. It may forget any of them earlier."""

    async def find(self, key: bytes) -> bytes | None:
        """Returns what was put under `key`, unless it was forgotten."""
        ...

    async def claim(self, key: bytes) -> bytes | bool:
        """Returns what was put under `key`, else whether it is now the asker's to find out.

        False means that another orchestrator is at it. A claim ends with `put` or `release`.
        """
        ...

    def claim_unseen(self, key: bytes) -> None:
        """Claims `key` soon, without a look at whether anybody has it: nobody is thought to."""
        ...

    def put(self, key: bytes, value: bytes, ttl_s: float) -> None:
        """Keeps `value` for at most `ttl_s` seconds."""
        ...

    def release(self, key: bytes) -> None:
        """Ends a claim that has come to nothing."""
        ...


@dataclass(frozen=True, slots=True)
class _Entry:
    value: bytes
    expires_s: float
    size_bytes: int


class MemoryStore:
    """Keeps entries in this process, within a bound; the least recently used go first.

    Nobody else sees it, so every claim is granted.
    """

    def __init__(self, max_bytes: int, clock: Clock = time.monotonic) -> None:
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._max_bytes = max_bytes
        self._clock = clock
        self.size_bytes = 0

    async def find(self, key: bytes) -> bytes | None:
        """Returns what was put under `key`, unless it is too old or was pushed out."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.expires_s <= self._clock():
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry.value

    async def claim(self, key: bytes) -> bytes | bool:
        """Returns what was put under `key`, else True."""
        answer = await self.find(key)
        return True if answer is None else answer

    def claim_unseen(self, key: bytes) -> None:
        """Does nothing: there is nobody to tell."""

    def release(self, key: bytes) -> None:
        """Does nothing: there is nobody to tell."""

    def put(self, key: bytes, value: bytes, ttl_s: float) -> None:
        """Keeps `value`, pushing out others; one that is larger than the bound is not kept."""
        size_bytes = len(key) + len(value) + _ENTRY_BYTES
        if key in self._entries:
            self._drop(key)
        if size_bytes > self._max_bytes:
            return
        while self.size_bytes + size_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))
        self._entries[key] = _Entry(value, self._clock() + ttl_s, size_bytes)
        self.size_bytes += size_bytes

    def _drop(self, key: bytes) -> None:
        self.size_bytes -= self._entries.pop(key).size_bytes
