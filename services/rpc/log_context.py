"""What is known of the call that runs now: its request id, its tenant, its trace.

Whatever is bound is in every log line and on every span of the call, and of the tasks that it
starts. Each call has a task of its own, so nothing has to be taken back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Final

Field = str | int | float | bool

_MOST_CHARACTERS: Final = 128
# One line, one word, and what may travel in gRPC metadata.
_ODD: Final = re.compile(r"[^\x21-\x7e]")
_BOUND: ContextVar[Mapping[str, Field]] = ContextVar("log_context", default=MappingProxyType({}))


def bind(**fields: Field) -> None:
    """Adds what is known of the call; a text may be its caller's, and is made fit for a line."""
    known = {
        name: fit(value) if isinstance(value, str) else value
        for name, value in fields.items()
        if value != ""
    }
    _BOUND.set({**_BOUND.get(), **known})


def bound() -> Mapping[str, Field]:
    """Returns what is known of the call."""
    return _BOUND.get()


def fit(text: str) -> str:
    r"""Returns a text as a log line and a gRPC header can bear it; of that again, the same.

    >>> fit("a\nb")
    'a?b'
    """
    return _ODD.sub("?", text[:_MOST_CHARACTERS])
