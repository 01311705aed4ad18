"""Says who is calling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and what its key allows; None where it does not say."""

    tenant: str
    key_id: str | None = None
    policies: tuple[str, ...] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrency: int | None = None


ANONYMOUS = Caller("anonymous")
_caller: ContextVar[Caller] = ContextVar("caller", default=ANONYMOUS)


def current_caller() -> Caller:
    """Returns who made the call that is being answered."""
    return _caller.get()


@contextmanager
def caller_is(caller: Caller) -> Iterator[None]:
    """Makes `caller` the one that calls, within the block."""
    token = _caller.set(caller)
    try:
        yield
    finally:
        _caller.reset(token)
