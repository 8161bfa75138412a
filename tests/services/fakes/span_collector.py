"""An OTLP collector: a real gRPC server that keeps the spans that it receives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from klein_services.runtime import tracing


@dataclass(frozen=True)
class Span:
    """A span that was received, with the process that it is from."""

    process: str
    raw: Any

    @property
    def name(self) -> str:
        return self.raw.name

    @property
    def id(self) -> bytes:
        return self.raw.span_id

    @property
    def parent(self) -> bytes:
        return self.raw.parent_span_id

    @property
    def trace(self) -> str:
        return self.raw.trace_id.hex()

    @property
    def kind(self) -> str:
        return type(self.raw).SpanKind.Name(self.raw.kind).removeprefix("SPAN_KIND_")

    @property
    def is_error(self) -> bool:
        return self.raw.status.code == self.raw.status.STATUS_CODE_ERROR

    @property
    def attributes(self) -> dict[str, Any]:
        return {item.key: _value(item.value) for item in self.raw.attributes}

    @property
    def events(self) -> list[tuple[str, dict[str, Any]]]:
        return [
            (event.name, {item.key: _value(item.value) for item in event.attributes})
            for event in self.raw.events
        ]


def _value(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))


@dataclass
class SpanCollector(trace_service_pb2_grpc.TraceServiceServicer):
    """Implements OTLP's TraceService, for threads (`Export`) and for an event loop alike."""

    spans: list[Span] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    endpoint: str = ""

    def keep(self, request: Any) -> None:
        self.requests.append(request)
        for resource in request.resource_spans:
            names = {item.key: item.value.string_value for item in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [Span(names["service.name"], span) for span in scope.spans]

    def Export(self, request: Any, context: Any) -> Any:
        self.keep(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def parent_of(self, span: Span) -> Span | None:
        return next((each for each in self.spans if each.id == span.parent), None)

    def path_of(self, span: Span) -> list[str]:
        """Returns `process: name` of a span and of those around it, the outermost first."""
        path: list[str] = []
        at: Span | None = span
        while at is not None:
            path.insert(0, f"{at.process}: {at.name}")
            at = self.parent_of(at)
        return path


@contextmanager
def collecting() -> Iterator[SpanCollector]:
    """Runs a collector on threads of this process, for servers in other processes."""
    from concurrent.futures import ThreadPoolExecutor

    collector = SpanCollector()
    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()


@asynccontextmanager
async def tracing_to_collector() -> AsyncIterator[SpanCollector]:
    """Turns tracing on in this process; the collector has all spans after `export`."""
    with collecting() as collector:
        tracing.start(collector.endpoint, "this-process", "1", {})
        try:
            yield collector
        finally:
            await export()


async def export() -> None:
    """Sends what was recorded, and turns tracing off."""
    await asyncio.to_thread(tracing.stop)
