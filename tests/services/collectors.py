"""A real OpenTelemetry collector for tests: it takes spans over OTLP gRPC and keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

Value = str | int | float | bool


@dataclass(frozen=True, slots=True)
class KeptSpan:
    """A span, and the service that sent it."""

    service: str
    span: Span

    @property
    def attributes(self) -> dict[str, Value]:
        """Its attributes."""
        return {pair.key: _value(pair.value) for pair in self.span.attributes}

    @property
    def events(self) -> list[dict[str, Value]]:
        """The attributes of its events."""
        return [
            {pair.key: _value(pair.value) for pair in event.attributes}
            for event in self.span.events
        ]


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it gets."""

    address: str = ""
    spans: list[KeptSpan] = field(default_factory=list)

    @property
    def url(self) -> str:
        """What a program is told as its endpoint."""
        return f"http://{self.address}"

    def Export(  # noqa: N802 - the proto's name
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Takes spans."""
        for resource in request.resource_spans:
            names = [
                pair.value.string_value
                for pair in resource.resource.attributes
                if pair.key == "service.name"
            ]
            for scope in resource.scope_spans:
                self.spans.extend(KeptSpan(names[0], span) for span in scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def of_trace(self, trace_id: bytes) -> list[KeptSpan]:
        """Returns the spans of one trace."""
        return [kept for kept in self.spans if kept.span.trace_id == trace_id]


@contextmanager
def collecting() -> Iterator[Collector]:
    """Collects spans until the block is left."""
    server = grpc.server(ThreadPoolExecutor(2))
    collector = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]  # untyped there
    collector.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None)


def _value(value: object) -> Value:
    kind = value.WhichOneof("value")  # type: ignore[attr-defined]  # an AnyValue of its own proto
    found: Value = getattr(value, kind)
    return found
