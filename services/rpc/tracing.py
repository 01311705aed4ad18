"""What one program tells the next of a call, and the spans of both: a server's and its caller's.

The request id always travels. Spans are kept only once `otlp.py` has been turned on with `use`;
before that nothing of OpenTelemetry is imported, and a span costs nothing. Attributes never hold
text of a problem or a step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, Protocol

from arbitrage.core.errors import ArbitrageError
from services.rpc.log_context import Field, bind, bound

REQUEST_ID_KEY: Final = "x-arbitrage-request-id"
_COUNTS: Final = ("token_count", "prefill_token_count", "cached_token_count")

Metadata = tuple[tuple[str, str], ...]


class Span(Protocol):
    """One call, as it is seen in a trace."""

    def metadata(self) -> Metadata:
        """Returns what lets the next program's span be a child of this one."""
        ...

    def show(self, fields: Mapping[str, Field]) -> None:
        """Adds attributes."""
        ...

    def add_event(self, name: str, fields: Mapping[str, Field]) -> None:
        """Adds something that happened now."""
        ...

    def end(self, error: str | None = None) -> None:
        """Ends it, well or with the reason of an error."""
        ...


class Tracer(Protocol):
    """Makes spans."""

    def server_span(self, name: str, received: Mapping[str, str | bytes]) -> Span:
        """Begins the span of a call that is answered, as the current one of its task.

        It belongs to the trace that the call's metadata name, if they name one.
        """
        ...

    def client_span(self, name: str) -> Span:
        """Begins a child of the current span."""
        ...

    def current_span(self) -> Span:
        """Returns the span of the call that is being answered."""
        ...


class _NoSpan:
    def metadata(self) -> Metadata:
        return ()

    def show(self, fields: Mapping[str, Field]) -> None:
        pass

    def add_event(self, name: str, fields: Mapping[str, Field]) -> None:
        pass

    def end(self, error: str | None = None) -> None:
        pass


class NoTracer:
    """Keeps no spans."""

    _SPAN: Final = _NoSpan()

    def server_span(self, name: str, received: Mapping[str, str | bytes]) -> Span:
        """Begins nothing."""
        return self._SPAN

    def client_span(self, name: str) -> Span:
        """Begins nothing."""
        return self._SPAN

    def current_span(self) -> Span:
        """Returns a span that nobody keeps."""
        return self._SPAN


_tracer: Tracer = NoTracer()


def use(tracer: Tracer) -> Tracer:
    """Makes every span with `tracer` from now on; returns the one before."""
    # Of the whole process, as loggers are, so that no port of the algorithm has to carry it.
    global _tracer
    before, _tracer = _tracer, tracer
    return before


def current_span() -> Span:
    """Returns the span of the call that is being answered."""
    return _tracer.current_span()


class ServedCall:
    """One call that a server answers: its place in the caller's trace, and its caller's id."""

    def __init__(self, method: str, received: Iterable[tuple[str, str | bytes]]) -> None:
        metadata = dict(received)
        self._span = _tracer.server_span(method, metadata)
        request_id = metadata.get(REQUEST_ID_KEY)
        if isinstance(request_id, str):
            bind(request_id=request_id)

    def end(self, code: str, reason: str | None) -> None:
        """Ends it with gRPC's code, and with the reason if there was an error."""
        self._span.show({**bound(), "code": code})
        self._span.end(reason)


class AskedModel:
    """One question to a model. `metadata` goes with every attempt at it."""

    def __init__(self, span: Span) -> None:
        self._span = span
        request_id = bound().get("request_id")
        named = () if request_id is None else ((REQUEST_ID_KEY, str(request_id)),)
        self.metadata: Metadata = (*named, *span.metadata())

    def answered(self, answer: object) -> None:
        """Shows what a core value or a message says of the model and of its tokens."""
        counts = {name: int(getattr(answer, name)) for name in _COUNTS if hasattr(answer, name)}
        revision = getattr(getattr(answer, "model", None), "revision", "")
        self._span.show({**counts, "model_revision": revision})


@contextmanager
def asking(role: str, method: str) -> Iterator[AskedModel]:
    """Holds a question to the model of a role, from its first attempt to its answer."""
    span = _tracer.client_span(f"{role} {method}")
    span.show({**bound(), "role": role})
    error: str | None = None
    try:
        yield AskedModel(span)
    except (asyncio.CancelledError, GeneratorExit):
        # Whoever asked has lost interest, which is no failure of the model.
        span.show({"cancelled": True})
        raise
    except Exception as failure:
        error = failure.reason if isinstance(failure, ArbitrageError) else type(failure).__name__
        raise
    finally:
        span.end(error)
