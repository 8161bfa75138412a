"""What happens around every call, in this order: tracing, metrics, access log, load report, errors."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc

from klein_core.errors import DeviceFault
from services.runtime import logs, metrics, tracing
from services.runtime.calls import Call, CallInterceptor
from services.runtime.errors import DeviceOutOfMemory
from services.runtime.load_report import LoadReport
from services.runtime.readiness import Readiness
from services.runtime.status import abort_with, status_of

_REJECTIONS = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
_access = logging.getLogger("klein.access")


def interceptors(
    readiness: Readiness, load: LoadReport | None, on_device_fault: Callable[[DeviceFault], None]
) -> Sequence[grpc.aio.ServerInterceptor]:
    """Returns the interceptors of a server, outermost first."""
    reporting = [LoadReportInterceptor(load, readiness.service_names)] if load else []
    return [
        TracingInterceptor(),
        MetricsInterceptor(),
        AccessLogInterceptor(),
        *reporting,
        ErrorInterceptor(readiness, on_device_fault),
    ]


def outcome(context: grpc.aio.ServicerContext[Any, Any], error: BaseException | None) -> grpc.StatusCode:
    """Returns how a call ended; CANCELLED or DEADLINE_EXCEEDED when its caller did not wait."""
    if isinstance(error, asyncio.CancelledError):
        remaining = context.time_remaining()
        expired = remaining is not None and remaining <= 0
        return grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    number = int(code or 0)  # gRPC gives the bare number where nothing was set
    return next(status for status in grpc.StatusCode if status.value[0] == number)


class TracingInterceptor(CallInterceptor):
    """Sets the request id and records the call's span."""

    @asynccontextmanager
    async def around(self, call: Call) -> AsyncIterator[None]:
        identity = logs.take_request_id(call.metadata)
        # No reset: each call is a task of its own with a context of its own.
        logs.request_id.set(identity)
        # In the trailers, because initial metadata sent early would forbid the caller's channel to retry.
        call.context.set_trailing_metadata(((logs.REQUEST_ID_KEY, identity),))
        if call.is_housekeeping:
            yield
            return
        with tracing.server_span(call.path, call.metadata) as span:
            try:
                yield
            finally:
                if span is not None:
                    span.set_attribute("request.id", identity)
                    code = call.context.code()
                    span.set_attribute("rpc.grpc.status_code", getattr(code, "value", (code or 0,))[0])


class MetricsInterceptor(CallInterceptor):
    """Counts and times calls under go-grpc-prometheus' names."""

    @asynccontextmanager
    async def around(self, call: Call) -> AsyncIterator[None]:
        labels = call.method.labels
        metrics.RPC_STARTED.labels(*labels).inc()
        started_at = time.monotonic()
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            code = outcome(call.context, error)
            metrics.RPC_HANDLED.labels(*labels, code.name).inc()
            metrics.RPC_SECONDS.labels(*labels).observe(time.monotonic() - started_at)


class AccessLogInterceptor(CallInterceptor):
    """Writes a line for each call; of probes only at debug level, as they would drown the rest."""

    @asynccontextmanager
    async def around(self, call: Call) -> AsyncIterator[None]:
        started_at = time.monotonic()
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            level = logging.DEBUG if call.is_housekeeping else logging.INFO
            fields = {
                "method": call.path.removeprefix("/"),
                "code": outcome(call.context, error).name,
                "seconds": round(time.monotonic() - started_at, 6),
                "peer": call.context.peer(),
            }
            _access.log(level, "call", extra=fields)


class LoadReportInterceptor(CallInterceptor):
    """Tells callers in the trailers how busy the stage is, which weighted_round_robin balances by."""

    def __init__(self, load: LoadReport, service_names: Sequence[str]) -> None:
        self._load = load
        self._service_names = frozenset(service_names)

    @asynccontextmanager
    async def around(self, call: Call) -> AsyncIterator[None]:
        yield
        if call.method.service in self._service_names:
            self._load.count()
            trailing = tuple(call.context.trailing_metadata() or ())
            call.context.set_trailing_metadata((*trailing, self._load.trailer()))


class ErrorInterceptor(CallInterceptor):
    """Refuses calls while the server is not ready, and turns errors into statuses."""

    def __init__(self, readiness: Readiness, on_device_fault: Callable[[DeviceFault], None]) -> None:
        self._readiness = readiness
        self._on_device_fault = on_device_fault

    @asynccontextmanager
    async def around(self, call: Call) -> AsyncIterator[None]:
        try:
            self._readiness.require(call.method.service)
            yield
        except (grpc.aio.AbortError, grpc.aio.UsageError):
            raise  # the handler ended the call itself, or the call is over
        except Exception as error:
            if isinstance(error, DeviceFault) and not isinstance(error, DeviceOutOfMemory):
                self._on_device_fault(error)
            status = status_of(error)
            if status.code in _REJECTIONS:
                reason = status.reason or status.code.name
                metrics.REJECTED.labels(self._readiness.stage, reason.lower()).inc()
            await abort_with(call.context, status)
