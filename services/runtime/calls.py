"""Surrounds calls of all of gRPC's four shapes with one context manager each."""

from __future__ import annotations

import asyncio
import inspect
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import Message

from services.runtime.metrics import Method
from services.runtime.stages import SERVICE_NAME as STAGE_SERVICE
from services.runtime.wire_frames import frame_deserializer

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
    behaviour = getattr(handler, name)
    method = Method.of(details.method, *shape)
    metadata = tuple(details.invocation_metadata or ())

    async def respond(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        async with around(Call(method, details.method, metadata, context)):
            return await behaviour(request, context)

    # Writing the messages here, rather than yielding them, makes a cancellation that arrives while one is
    # being sent pass through `around` and close the handler's generator at once.
    async def respond_with_stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        async with around(Call(method, details.method, metadata, context)):
            await _write_all(behaviour(request, context), context)

    wrapper = respond_with_stream if handler.response_streaming else respond
    made: grpc.RpcMethodHandler[Any, Any] = make(
        wrapper,
        request_deserializer=_sparing_frames(handler.request_deserializer),
        response_serializer=_unless_serialised(handler.response_serializer),
    )
    return made


def _sparing_frames(deserialise: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """Lets requests that carry a frame arrive without protobuf's copies; see `wire_frames`."""
    message_class = getattr(deserialise, "__self__", None)
    if isinstance(message_class, type) and issubclass(message_class, Message):
        return frame_deserializer(message_class)
    return deserialise


def _unless_serialised(serialise: Callable[[Any], bytes] | None) -> Callable[[Any], bytes]:
    """Lets handlers answer with messages that they have serialised themselves."""
    return lambda message: message if isinstance(message, bytes) or serialise is None else serialise(message)


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
