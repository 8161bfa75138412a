"""Surrounds calls of all of gRPC's four shapes with one context manager each."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import Message

from klein_core.errors import DeviceFault
from klein_services.runtime import logs, metrics, tracing
from klein_services.runtime.errors import DeviceOutOfMemory
from klein_services.runtime.health import Readiness
from klein_services.runtime.metrics import Method
from klein_services.runtime.orca import LoadReport
from klein_services.runtime.protowire import frame_deserializer
from klein_services.runtime.stage import SERVICE_NAME as STAGE_SERVICE
from klein_services.runtime.status import abort_with, status_of

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]]"


@dataclass(frozen=True)
class Call:
    """A call that is being handled."""

    method: Method
    path: str
    """`/package.Service/Method`."""
    metadata: tuple[tuple[str, str | bytes], ...]
    context: grpc.aio.ServicerContext[Any, Any]

    @property
    def is_housekeeping(self) -> bool:
        """Whether it is a probe: of health, reflection, channelz or what a stage is."""
        return self.method.service.startswith("grpc.") or self.method.service == STAGE_SERVICE


class CallInterceptor(grpc.aio.ServerInterceptor, ABC):
    """Base of interceptors: `around` is entered before the handler and left after its last message."""

    @abstractmethod
    def around(self, call: Call) -> AbstractAsyncContextManager[None]:
        """Returns what surrounds the handler; sees its exceptions, cancellation too."""

    async def intercept_service(
        self, continuation: _Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> _Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # an unknown method, which gRPC answers with UNIMPLEMENTED
        return _wrapped(handler, handler_call_details, self.around)


_Around = Callable[[Call], AbstractAsyncContextManager[None]]


def _wrapped(
    handler: grpc.RpcMethodHandler[Any, Any], details: grpc.HandlerCallDetails, around: _Around
) -> grpc.RpcMethodHandler[Any, Any]:
    shape = (handler.request_streaming, handler.response_streaming)
    name, make = _SHAPES[shape]
    behavior = getattr(handler, name)
    method = Method.of(details.method, *shape)
    metadata = tuple(details.invocation_metadata or ())

    async def respond(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        async with around(Call(method, details.method, metadata, context)):
            return await behavior(request, context)

    # Writing the messages here, rather than yielding them, makes a cancellation that arrives while one is
    # being sent pass through `around` and close the handler's generator at once.
    async def respond_with_stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        async with around(Call(method, details.method, metadata, context)):
            await _write_all(behavior(request, context), context)

    wrapper = respond_with_stream if handler.response_streaming else respond
    made: grpc.RpcMethodHandler[Any, Any] = make(
        wrapper,
        request_deserializer=_sparing_frames(handler.request_deserializer),
        response_serializer=_unless_serialized(handler.response_serializer),
    )
    return made


def _sparing_frames(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """Lets requests that carry a frame arrive without protobuf's copies; see `wire_frames`."""
    message_class = getattr(deserialize, "__self__", None)
    if isinstance(message_class, type) and issubclass(message_class, Message):
        return frame_deserializer(message_class)
    return deserialize


def _unless_serialized(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes]:
    """Lets handlers answer with messages that they have serialized themselves."""
    return lambda message: message if isinstance(message, bytes) or serialize is None else serialize(message)


async def _write_all(
    responses: AsyncGenerator[Any, None] | Awaitable[None], context: grpc.aio.ServicerContext[Any, Any]
) -> None:
    if inspect.isasyncgen(responses):
        async with aclosing(responses):
            async for response in responses:
                await write_response(response, context)
    else:
        await responses  # type: ignore[misc]


async def write_response(response: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Sends a message, once the caller has room for it.

    Raises:
        CancelledError: the caller has gone.
    """
    try:
        await context.write(response)
    except grpc.aio.InternalError:
        # The caller has gone. gRPC cancels this task for it, but the write may fail a moment earlier.
        raise asyncio.CancelledError from None


_SHAPES: dict[tuple[bool, bool], tuple[str, Callable[..., Any]]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


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
