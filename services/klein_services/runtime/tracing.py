"""OpenTelemetry traces over OTLP; its packages are imported only when an endpoint is set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc

_provider: Any = None


def start(endpoint: str, service_name: str, version: str) -> None:
    """Starts to export spans to an OTLP gRPC endpoint; an empty endpoint leaves tracing off."""
    global _provider
    if not endpoint:
        return
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": service_name, "service.version": version})
    _provider = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))
    _provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(_provider)


def stop() -> None:
    """Exports the remaining spans. The last thing that a server does."""
    global _provider
    if _provider is not None:
        _provider.shutdown()
        _provider = None


def enabled() -> bool:
    """Returns whether spans are recorded."""
    return _provider is not None


def client_interceptors() -> Sequence[grpc.aio.ClientInterceptor]:
    """Returns interceptors by which a channel's calls carry the current trace; none while tracing is off."""
    if not enabled():
        return []
    from opentelemetry.instrumentation.grpc import aio_client_interceptors

    return aio_client_interceptors(tracer_provider=_provider)  # type: ignore[no-any-return, no-untyped-call]


@contextmanager
def span(name: str, **attributes: str | int | float | bool) -> Iterator[None]:
    """Records a span around a block; costs nothing while tracing is off."""
    if not enabled():
        yield
        return
    with _provider.get_tracer("klein-suite").start_as_current_span(name, attributes=attributes):
        yield


@contextmanager
def server_span(path: str, metadata: Sequence[tuple[str, str | bytes]]) -> Iterator[Any]:
    """Records the span of an incoming call, as a child of the client's span.

    Own code because the instrumentation package's server side cannot wrap handlers that write their
    responses, as the standard health service's Watch does, and leaves a stream's span open when its client
    disconnects.
    """
    if not enabled():
        yield None
        return
    from opentelemetry import propagate
    from opentelemetry.trace import SpanKind

    carrier = {key: value for key, value in metadata if isinstance(value, str)}
    service, _, method = path.removeprefix("/").rpartition("/")
    attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
    with _provider.get_tracer("klein-suite").start_as_current_span(
        path.removeprefix("/"),
        context=propagate.extract(carrier),
        kind=SpanKind.SERVER,
        attributes=attributes,
    ) as current:
        yield current


def trace_id() -> str:
    """Returns the current trace's id in hexadecimal; empty while tracing is off."""
    if not enabled():
        return ""
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else ""
