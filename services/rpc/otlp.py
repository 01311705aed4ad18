"""Keeps spans with OpenTelemetry and sends them to a collector over OTLP.

Nothing else imports OpenTelemetry, and this module only where tracing is on. A collector that is
not there costs nothing but spans: they are sent from a thread, kept in a bounded queue, and the
log says once that they are lost and once that they are taken again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Thread
from typing import Final

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from arbitrage.version import VERSION
from services.rpc import tracing
from services.rpc.log_context import Field, bind
from services.rpc.tracing import Metadata, Span

_log = logging.getLogger(__name__)
_FLUSH_S: Final = 2.0
_PROPAGATOR: Final = TraceContextTextMapPropagator()
_ON_LINES_ONLY: Final = frozenset({"trace_id", "span_id"})


class OtelSpan:
    """A span of OpenTelemetry, with attributes under `arbitrage.`."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    def metadata(self) -> Metadata:
        """Returns the W3C headers."""
        headers: dict[str, str] = {}
        _PROPAGATOR.inject(headers, trace.set_span_in_context(self._span))
        return tuple(headers.items())

    def show(self, fields: Mapping[str, Field]) -> None:
        """Adds attributes."""
        self._span.set_attributes(_attributes(fields))

    def add_event(self, name: str, fields: Mapping[str, Field]) -> None:
        """Adds something that happened now."""
        self._span.add_event(name, _attributes(fields))

    def end(self, error: str | None = None) -> None:
        """Ends it, well or with the reason of an error."""
        if error is not None:
            self._span.set_status(trace.StatusCode.ERROR, error)
        self._span.end()


class OtelTracer:
    """Makes spans of OpenTelemetry."""

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer

    def server_span(self, name: str, received: Mapping[str, str | bytes]) -> Span:
        """Begins the span of a call that is answered, as the current one of its task."""
        parent = _PROPAGATOR.extract(received)
        span = self._tracer.start_span(name, parent, trace.SpanKind.SERVER)
        # Not taken back: the task ends with the call.
        otel_context.attach(trace.set_span_in_context(span, parent))
        ids = span.get_span_context()
        bind(
            trace_id=trace.format_trace_id(ids.trace_id), span_id=trace.format_span_id(ids.span_id)
        )
        return OtelSpan(span)

    def client_span(self, name: str) -> Span:
        """Begins a child of the current span."""
        return OtelSpan(self._tracer.start_span(name, kind=trace.SpanKind.CLIENT))

    def current_span(self) -> Span:
        """Returns the span of the call that is being answered."""
        return OtelSpan(trace.get_current_span())


class _Reporting(SpanExporter):
    """Says once when spans begin to be lost, and once when they no longer are."""

    def __init__(self, inner: SpanExporter, endpoint: str) -> None:
        self._inner = inner
        self._endpoint = endpoint
        self._is_lost = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._inner.export(spans)
        is_lost = result is not SpanExportResult.SUCCESS
        if is_lost and not self._is_lost:
            _log.warning("the collector at %s takes no spans; they are lost", self._endpoint)
        elif self._is_lost and not is_lost:
            _log.info("the collector at %s takes spans again", self._endpoint)
        self._is_lost = is_lost
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()


@contextmanager
def traces_sent(endpoint: str, sample_rate: float, component: str) -> Iterator[None]:
    """Sends spans to a collector while the block runs, and what is left within some seconds.

    Traces that a caller began are sampled as the caller says, others at `sample_rate`.
    """
    # It warns at every attempt, and at every span that finds its queue full.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    exporter = _Reporting(OTLPSpanExporter(endpoint), endpoint)
    provider = TracerProvider(
        ParentBased(TraceIdRatioBased(sample_rate)),
        Resource.create(
            {
                "service.namespace": "arbitrage",
                "service.name": component,
                "service.version": VERSION,
            }
        ),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    before = tracing.use(OtelTracer(provider.get_tracer("arbitrage", VERSION)))
    try:
        yield
    finally:
        tracing.use(before)
        _flush(provider, exporter)


def _flush(provider: TracerProvider, exporter: SpanExporter) -> None:
    # The SDK would wait half a minute for a collector that is not there.
    flushing = Thread(target=provider.shutdown, name="flush spans", daemon=True)
    flushing.start()
    flushing.join(_FLUSH_S)
    if flushing.is_alive():
        exporter.shutdown()
        flushing.join(_FLUSH_S)


def _attributes(fields: Mapping[str, Field]) -> dict[str, Field]:
    return {
        f"arbitrage.{name}": value for name, value in fields.items() if name not in _ON_LINES_ONLY
    }
