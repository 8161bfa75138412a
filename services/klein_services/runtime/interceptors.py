"""Server interceptor: the list of context managers that surrounds every call, and those context managers."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, Protocol, TypeAlias

import grpc
from google.protobuf.message import DecodeError, Message

from klein_core.errors import DeviceFault
from klein_services.runtime import logs, metrics, tracing
from klein_services.runtime.caller import Caller, caller, caller_at, forwarded_caller
from klein_services.runtime.checksums import adding_checksums, checking
from klein_services.runtime.errors import (
    DeviceOutOfMemory,
    PermissionDenied,
    Unauthenticated,
    UndecodableMessage,
)
from klein_services.runtime.grpc_quirks import write_response
from klein_services.runtime.health import ServerHealth
from klein_services.runtime.metrics import Method
from klein_services.runtime.orca import LoadReport
from klein_services.runtime.protowire import frame_deserializer
from klein_services.runtime.semantic_conventions import KLEIN_CALLER
from klein_services.runtime.stage import STAGE_SERVICE
from klein_services.runtime.status import abort_with, status_of
from klein_services.runtime.tls import check_peer

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]]"
_REJECTIONS = (
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
)
"""Codes of refusals: the server is busy or not ready, or the request is wrong or not allowed."""
_OWN_SERVICES = "/klein_api."
"""Begin of the paths of the suite's own methods; gRPC's standard services follow their own protocols."""
_access = logging.getLogger("klein.access")
_undecodable = logs.RareWarning(
    _access, "requests were refused because their bytes are no message of the API"
)
_unauthenticated = logs.RareWarning(_access, "requests without a valid token were refused")


@dataclass
class Call:
    """A call that is being handled."""

    method: Method
    path: str
    """`/package.Service/Method`."""
    context: grpc.aio.ServicerContext[Any, Any]
    is_noise: bool = False
    """Whether its line in the access log is of no use: its cause is logged elsewhere, once a minute."""

    @property
    def metadata(self) -> Sequence[tuple[str, str | bytes]]:
        """The client's metadata."""
        return tuple(self.context.invocation_metadata() or ())

    @property
    def is_housekeeping(self) -> bool:
        """Whether it is a probe: health, reflection, channelz, DescribeStage or KEDA's."""
        return (
            self.method.service.startswith(("grpc.", "externalscaler."))
            or self.method.service == STAGE_SERVICE
        )


class Guard(Protocol):
    """Authentication of a server's calls."""

    def caller_of(self, path: str, metadata: Sequence[tuple[str, str | bytes]]) -> Caller | None:
        """Returns the caller of a call by its token; `None` for methods that are open to all.

        Raises:
            Unauthenticated: there is no valid token.
            PermissionDenied: the method is closed to its token.
        """


CallContext: TypeAlias = Callable[[Call], AbstractAsyncContextManager[None]]
"""Makes what is entered before a call's handler and left after its last message; sees its exceptions."""


def call_contexts(
    health: ServerHealth,
    load: LoadReport | None,
    on_device_fault: Callable[[DeviceFault], None],
    *,
    is_public: bool = False,
    client_names: frozenset[str] = frozenset(),
    guard: Guard | None = None,
) -> list[CallContext]:
    """Returns everything that surrounds a call of a server, outermost first.

    Args:
        health: which services take calls now.
        load: reported to clients that balance by it; `None` reports nothing.
        on_device_fault: called when a handler has lost its device.
        is_public: whether clients call it whose word about their identity is not believed.
        client_names: names one of which a client's certificate must have; with none, clients are not asked.
        guard: decides which calls may be made; `None` lets all pass.
    """
    return [
        partial(identify_and_trace, is_public),
        count_and_time,
        log_access,
        *([partial(report_load, load, frozenset(health.service_names))] if load else []),
        partial(refuse_or_answer_errors, health, on_device_fault),
        *([partial(refuse_strangers, client_names)] if client_names else []),
        *([partial(authenticate, guard)] if guard else []),
    ]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Enters `contexts` in their order around every call of all four shapes.

    The message of a call that `guard` refuses is not even received: it may have hundreds of megabytes.

    Args:
        contexts: what is entered, outermost first.
        guard: decides which calls may be made; `None` lets all pass.
        has_checksums: whether messages of the suite's own services have checksums, as those of stages do.
    """

    def __init__(
        self, contexts: Sequence[CallContext], guard: Guard | None = None, *, has_checksums: bool = False
    ) -> None:
        self._contexts = tuple(contexts)
        self._guard = guard
        self._has_checksums = has_checksums
        self._wrapped: dict[tuple[str, bool], tuple[_Handler, _Handler]] = {}
        """Path and whether its message is read → the registered handler and the one that surrounds it; made at a
        method's first call."""

    async def intercept_service(
        self, continuation: _Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> _Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None  # an unknown method, which gRPC answers with UNIMPLEMENTED
        path, is_read = handler_call_details.method, True
        if self._guard is not None:
            try:
                self._guard.caller_of(path, tuple(handler_call_details.invocation_metadata or ()))
            except (Unauthenticated, PermissionDenied):
                is_read = False
        registered, wrapped = self._wrapped.get((path, is_read), (None, None))
        if wrapped is None or registered is not handler:
            wrapped = self._surrounded(path, handler, is_read)
            self._wrapped[path, is_read] = (handler, wrapped)
        return wrapped

    def _surrounded(self, path: str, handler: _Handler, is_read: bool) -> _Handler:
        shape = (handler.request_streaming, handler.response_streaming)
        name, make = _SHAPES[shape]
        behavior = getattr(handler, name)
        if not is_read:
            # gRPC receives the message of a unary request before it calls a handler, but not that of a stream.
            make = _SHAPES[True, handler.response_streaming][1]
        method = Method.of(path, *shape)
        serialize, deserialize = handler.response_serializer, handler.request_deserializer
        message_class = getattr(deserialize, "__self__", None)
        has_checksums = self._has_checksums and path.startswith(_OWN_SERVICES)
        if isinstance(message_class, type) and issubclass(message_class, Message):
            # A generated service's method, whose frames need not be copied by protobuf.
            parse = frame_deserializer(message_class)
            deserialize = _decoder(
                checking(parse) if has_checksums else parse, message_class.DESCRIPTOR.full_name
            )

        def check(request: Any) -> None:
            if isinstance(request, _Undecodable):
                request.refuse()
            if not is_read:
                raise Unauthenticated  # a token that became valid after the call was refused

        async def respond(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            async with AsyncExitStack() as stack:
                await self._enter_all(stack, Call(method, path, context))
                check(request)
                return await behavior(request, context)

        # Writing the messages here, rather than yielding them, makes a cancellation that arrives while one is
        # being sent pass through the contexts and close the handler's generator at once.
        async def respond_with_stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            async with AsyncExitStack() as stack:
                await self._enter_all(stack, Call(method, path, context))
                check(request)
                await _write_all(behavior(request, context), context)

        # Handlers may answer with messages that they have serialized themselves.
        def encode(response: Any) -> bytes:
            return response if isinstance(response, bytes) or serialize is None else serialize(response)

        surrounded: _Handler = make(
            respond_with_stream if handler.response_streaming else respond,
            request_deserializer=deserialize,
            response_serializer=adding_checksums(encode) if has_checksums else encode,
        )
        return surrounded

    async def _enter_all(self, stack: AsyncExitStack, call: Call) -> None:
        for context in self._contexts:
            await stack.enter_async_context(context(call))


class _Undecodable:
    """Stands for a message that cannot be decoded. Every use of it in a stream of requests raises the refusal.

    An exception in a deserializer never reaches the contexts: gRPC answers it with UNKNOWN and the name of a Python
    class, and logs a traceback.
    """

    def __init__(self, message_name: str) -> None:
        self._message_name = message_name

    def refuse(self) -> NoReturn:
        raise UndecodableMessage(self._message_name)

    def __getattr__(self, name: str) -> NoReturn:
        self.refuse()


def _decoder(deserialize: Callable[[bytes], Any], message_name: str) -> Callable[[bytes], Any]:
    def decode(raw: bytes) -> Any:
        try:
            return deserialize(raw)
        except DecodeError:
            return _Undecodable(message_name)

    return decode


_SHAPES: dict[tuple[bool, bool], tuple[str, Callable[..., Any]]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


async def _write_all(
    responses: AsyncGenerator[Any, None] | Awaitable[None], context: grpc.aio.ServicerContext[Any, Any]
) -> None:
    if inspect.isasyncgen(responses):
        async with aclosing(responses):
            async for response in responses:
                await write_response(response, context)
    else:
        await responses  # type: ignore[misc]


@asynccontextmanager
async def identify_and_trace(is_public: bool, call: Call) -> AsyncIterator[None]:
    """Sets the request id and the caller, and records the call's span."""
    identity = logs.take_request_id(call.metadata)
    # Never reset: each call is a task with its own context.
    logs.request_id.set(identity)
    peer = call.context.peer()
    caller.set(caller_at(peer) if is_public else forwarded_caller(call.metadata, peer))
    # In the trailers, because initial metadata sent early would forbid the client's channel to retry.
    call.context.set_trailing_metadata(((logs.REQUEST_ID_KEY, identity),))
    if call.is_housekeeping:
        yield
        return
    if not tracing.enabled():
        yield
        return
    span = tracing.server_span(call.path, call.metadata)
    error: BaseException | None = None
    try:
        with span.current():
            yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        span.set({KLEIN_CALLER: caller.get().name})
        tracing.end_server_span(span, outcome(call.context, error), identity)


@asynccontextmanager
async def count_and_time(call: Call) -> AsyncIterator[None]:
    """Counts and times calls under go-grpc-prometheus' names."""
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
        metrics.RPC_SECONDS.labels(*labels).observe(time.monotonic() - started_at, metrics.exemplar())


@asynccontextmanager
async def log_access(call: Call) -> AsyncIterator[None]:
    """Logs a line for each call; probes only at debug level, because they would drown the rest."""
    started_at = time.monotonic()
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        level = logging.DEBUG if call.is_housekeeping or call.is_noise else logging.INFO
        fields = {
            "method": call.path.removeprefix("/"),
            "code": outcome(call.context, error).name,
            "seconds": round(time.monotonic() - started_at, 6),
            "caller": caller.get().name,
            "peer": call.context.peer(),
        }
        _access.log(level, "call", extra=fields)


def outcome(context: grpc.aio.ServicerContext[Any, Any], error: BaseException | None) -> grpc.StatusCode:
    """Returns how a call ended; CANCELLED or DEADLINE_EXCEEDED when its client did not wait."""
    if isinstance(error, asyncio.CancelledError):
        remaining = context.time_remaining()
        expired = remaining is not None and remaining <= 0
        return grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    number = int(code or 0)  # gRPC gives the bare number where nothing was set
    return next(status for status in grpc.StatusCode if status.value[0] == number)


@asynccontextmanager
async def report_load(load: LoadReport, service_names: frozenset[str], call: Call) -> AsyncIterator[None]:
    """Adds the stage's load to the trailers of successful calls; weighted_round_robin balances by it."""
    yield
    if call.method.service in service_names:
        load.count()
        trailing = tuple(call.context.trailing_metadata() or ())
        call.context.set_trailing_metadata((*trailing, load.trailer()))


@asynccontextmanager
async def refuse_or_answer_errors(
    health: ServerHealth, on_device_fault: Callable[[DeviceFault], None], call: Call
) -> AsyncIterator[None]:
    """Refuses calls while the server is not ready, and turns a handler's exceptions into statuses."""
    try:
        health.check_serving(call.method.service)
        yield
    except (grpc.aio.AbortError, grpc.aio.UsageError):
        raise  # the handler ended the call itself, or the call is over
    except Exception as error:
        if isinstance(error, DeviceFault) and not isinstance(error, DeviceOutOfMemory):
            on_device_fault(error)
        status = status_of(error)
        if isinstance(error, UndecodableMessage):
            call.is_noise = True
            _undecodable.occurred(method=call.path.removeprefix("/"), peer=call.context.peer())
        elif isinstance(error, Unauthenticated):
            call.is_noise = True
            _unauthenticated.occurred(method=call.path.removeprefix("/"), peer=call.context.peer())
        if status.code in _REJECTIONS:
            reason = status.reason or status.code.name
            metrics.count_rejection(health.stage, reason.lower())
        await abort_with(call.context, status)


@asynccontextmanager
async def authenticate(guard: Guard, call: Call) -> AsyncIterator[None]:
    """Refuses calls without a valid token, and makes the others' caller the tenant of their token."""
    tenant = guard.caller_of(call.path, call.metadata)
    if tenant is not None:
        caller.set(tenant)
    yield


@asynccontextmanager
async def refuse_strangers(client_names: frozenset[str], call: Call) -> AsyncIterator[None]:
    """Refuses clients whose certificate has none of the allowed names, probes included."""
    check_peer(call.context.auth_context(), client_names)
    yield
