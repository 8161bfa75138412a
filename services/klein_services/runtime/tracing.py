"""OpenTelemetry traces over OTLP; its packages are imported only when an endpoint is set.

A request is one trace over all processes. Each call between two of them has a client's and a server's span; spans of
queues, computing, steps and hops are inside those. Names and attributes are in `semantic_conventions`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import grpc

from klein_services.runtime import semantic_conventions as names
from klein_services.runtime.otlp_endpoint import wanted_endpoint

Value: TypeAlias = str | int | float | bool
Attributes: TypeAlias = Mapping[str, Value]
EXPORT_SECONDS = 5.0
"""Most time that the spans which are left take at the end of a process whose collector does not answer."""
_provider: Any = None
_exporter: Any = None
_tracer: Any = None
_log = logging.getLogger("klein.tracing")


def start(
    endpoint: str, service_name: str, version: str, environment: Mapping[str, str] = os.environ
) -> None:
    """Starts to export spans to an OTLP gRPC endpoint.

    Without an endpoint, here or in OpenTelemetry's own variables, tracing stays off. Sampling, headers, timeouts,
    batches and further resource attributes come from OpenTelemetry's variables.

    Args:
        endpoint: KLEIN_OTLP_ENDPOINT, which wins over OpenTelemetry's variables.
        service_name: the process, `service.name` of its spans.
        version: of the suite.
        environment: where OpenTelemetry's variables are.

    Raises:
        EndpointError: the endpoint is no URL.
    """
    global _provider, _exporter, _tracer
    endpoint = wanted_endpoint(endpoint, environment)
    if not endpoint:
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    attributes = {"service.version": version, "service.namespace": names.PROVIDER}
    if not environment.get("OTEL_SERVICE_NAME"):
        attributes["service.name"] = service_name
    _provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
    _exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))
    _provider.add_span_processor(BatchSpanProcessor(_exporter))
    _tracer = _provider.get_tracer(names.PROVIDER, version)


def stop() -> None:
    """Exports the remaining spans; after `EXPORT_SECONDS` they are dropped. The last thing that a server does."""
    global _provider, _exporter, _tracer
    if _provider is None:
        return
    # The provider's own shutdown has no bound that can be set: it retries for as long as the exporter does.
    exporting = threading.Thread(target=_provider.shutdown, name="last-spans", daemon=True)
    exporting.start()
    exporting.join(EXPORT_SECONDS)
    if exporting.is_alive():
        _exporter.shutdown()
        exporting.join(EXPORT_SECONDS)
        _log.warning("spans are lost: the collector did not answer within %g s", EXPORT_SECONDS)
    _provider = _exporter = _tracer = None


def enabled() -> bool:
    """Returns whether spans are recorded."""
    return _tracer is not None


class OpenSpan:
    """A span that lasts until `end`, whichever task or thread calls it. Without a span, as while tracing is off, its
    methods do nothing.
    """

    def __init__(self, span: Any = None) -> None:
        self._span = span

    def __bool__(self) -> bool:
        return self._span is not None

    def set(self, attributes: Attributes) -> None:
        """Adds attributes."""
        if self._span is not None:
            self._span.set_attributes(attributes)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes it the parent of the spans that begin in the block, and in tasks that the block creates."""
        if self._span is None:
            yield
            return
        from opentelemetry import trace

        with trace.use_span(self._span, record_exception=False, set_status_on_exception=False):
            yield

    def headers(self) -> tuple[tuple[str, str], ...]:
        """Returns the metadata by which a call's server makes this span the parent of its own."""
        if self._span is None:
            return ()
        from opentelemetry import trace

        return _injected(trace.set_span_in_context(self._span))

    def end(self, code: grpc.StatusCode, *, is_error: bool | None = None) -> None:
        """Ends the span of a call or a request.

        Args:
            code: how it ended.
            is_error: whether that is an error of this span; by default with every code but OK.
        """
        if self._span is None:
            return
        if code is not grpc.StatusCode.OK and is_error is not False:
            _set_error(self._span, code.name)
        self._span.end()


NO_SPAN = OpenSpan()
"""The span of everything that happens while tracing is off."""


@contextmanager
def span(name: str, attributes: Attributes | None = None) -> Iterator[None]:
    """Records a span around a block; costs nothing while tracing is off."""
    if _tracer is None:
        yield
        return
    with _tracer.start_as_current_span(
        name, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as opened:
        try:
            yield
        except Exception as error:
            # The class and not the text, which may repeat what a client sent.
            _set_error(opened, type(error).__name__)
            raise


def open_span(name: str, attributes: Attributes | None = None) -> OpenSpan:
    """Begins a span of this process, a child of the current one."""
    return NO_SPAN if _tracer is None else OpenSpan(_tracer.start_span(name, attributes=attributes))


def client_span(path: str, target: str) -> OpenSpan:
    """Begins the span of a call that this process makes; its `headers` belong into the call's metadata.

    Args:
        path: `/package.Service/Method`.
        target: gRPC target of the server.

    Own code because the instrumentation package's interceptors emit old attribute names, and change how streams that
    are written to report their status and their cancellation.
    """
    if _tracer is None:
        return NO_SPAN
    from opentelemetry.trace import SpanKind

    method = path.removeprefix("/")
    host, _, port = target.rpartition("/")[2].rpartition(":")
    attributes = _rpc_attributes(method) | {names.SERVER_ADDRESS: host.strip("[]") or target}
    if port.isdecimal():
        attributes[names.SERVER_PORT] = int(port)
    return OpenSpan(_tracer.start_span(method, kind=SpanKind.CLIENT, attributes=attributes))


def end_client_span(opened: OpenSpan, code: grpc.StatusCode) -> None:
    """Ends the span of a call that this process made."""
    opened.set({names.RPC_RESPONSE_STATUS_CODE: code.name})
    opened.end(code)


def server_span(path: str, metadata: Sequence[tuple[str, str | bytes]]) -> OpenSpan:
    """Begins the span of an incoming call, as a child of the client's span.

    Own code because the instrumentation package's server side cannot wrap handlers that write their
    responses, as the standard health service's Watch does, and leaves a stream's span open when its client
    disconnects.
    """
    if _tracer is None:
        return NO_SPAN
    from opentelemetry import propagate
    from opentelemetry.trace import SpanKind

    carrier = {key: value for key, value in metadata if isinstance(value, str)}
    method = path.removeprefix("/")
    return OpenSpan(
        _tracer.start_span(
            method,
            context=propagate.extract(carrier),
            kind=SpanKind.SERVER,
            attributes=_rpc_attributes(method),
        )
    )


def http_server_span(method: str, headers: Iterable[tuple[str, str]]) -> OpenSpan:
    """Begins the span of an incoming HTTP request, as a child of the client's span."""
    if _tracer is None:
        return NO_SPAN
    from opentelemetry import propagate
    from opentelemetry.trace import SpanKind

    return OpenSpan(
        _tracer.start_span(
            method,
            context=propagate.extract(dict(headers)),
            kind=SpanKind.SERVER,
            attributes={names.HTTP_REQUEST_METHOD: method},
        )
    )


def end_http_server_span(opened: OpenSpan, route: str, status: int, request_id: str) -> None:
    """Ends the span of an incoming HTTP request; statuses from 500 on are errors of this server."""
    opened.set(
        {
            names.HTTP_ROUTE: route,
            names.HTTP_RESPONSE_STATUS_CODE: status,
            names.KLEIN_REQUEST_ID: request_id,
        }
    )
    opened.end(grpc.StatusCode.UNKNOWN if status >= 500 else grpc.StatusCode.OK)


def end_server_span(opened: OpenSpan, code: grpc.StatusCode, request_id: str) -> None:
    """Ends the span of an incoming call."""
    opened.set({names.RPC_RESPONSE_STATUS_CODE: code.name, names.KLEIN_REQUEST_ID: request_id})
    opened.end(code, is_error=code in names.SERVER_ERRORS)


def record(
    name: str, begin: float, end: float, attributes: Attributes | None = None, parent: Any = None
) -> None:
    """Records a span that is over, as a child of the current span or of `parent`.

    Args:
        name: of the span.
        begin: reading of `time.monotonic()` at its begin.
        end: the same at its end.
        attributes: of the span.
        parent: what `current_parent` returned; `None` is the current span.
    """
    if _tracer is None:
        return
    # Wall-clock time of the monotonic clock's zero, read anew because the system's clock may be set.
    zero = time.time_ns() - time.monotonic_ns()
    _tracer.start_span(name, context=parent, attributes=attributes, start_time=zero + int(begin * 1e9)).end(
        zero + int(end * 1e9)
    )


def add_event(name: str, attributes: Attributes) -> None:
    """Adds an event to the current span."""
    if _tracer is not None:
        from opentelemetry import trace

        trace.get_current_span().add_event(name, attributes)


def annotate(attributes: Attributes) -> None:
    """Adds attributes to the current span."""
    if _tracer is not None:
        from opentelemetry import trace

        trace.get_current_span().set_attributes(attributes)


def current_parent() -> Any:
    """Returns the current span as `parent` of `record`, for other threads; `None` while tracing is off."""
    if _tracer is None:
        return None
    from opentelemetry import context

    return context.get_current()


def headers() -> tuple[tuple[str, str], ...]:
    """Returns the metadata that makes a call part of the current trace; empty while tracing is off."""
    return () if _tracer is None else _injected(None)


def identifiers() -> tuple[str, str]:
    """Returns the ids of the current trace and span in hexadecimal; empty ones without a span."""
    context = _span_context()
    return (f"{context.trace_id:032x}", f"{context.span_id:016x}") if context else ("", "")


def trace_id() -> str:
    """Returns the current trace's id in hexadecimal; empty while tracing is off."""
    return identifiers()[0]


def sampled_trace_id() -> str:
    """Returns the current trace's id if the trace is exported, as exemplars need it; else an empty one."""
    context = _span_context()
    return f"{context.trace_id:032x}" if context and context.trace_flags.sampled else ""


def _span_context() -> Any:
    if _tracer is None:
        return None
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    return context if context.is_valid else None


def _injected(context: Any) -> tuple[tuple[str, str], ...]:
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier, context)
    return tuple((key.lower(), value) for key, value in carrier.items())


def _rpc_attributes(method: str) -> dict[str, str | int]:
    return {names.RPC_SYSTEM_NAME: names.GRPC, names.RPC_METHOD: method}


def _set_error(opened: Any, kind: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    opened.set_attribute(names.ERROR_TYPE, kind)
    opened.set_status(Status(StatusCode.ERROR, kind))
