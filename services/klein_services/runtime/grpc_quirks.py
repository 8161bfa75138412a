"""Workarounds for behavior of grpc.aio, each with a link to the discussion of what it works around."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

_DISCARD_SECONDS = 2.0
_PAUSE_SECONDS = 0.1
_LOCAL_DETAILS = "Internal error from Core"
_STATUS_WAIT_SECONDS = 1.0


async def write_response(response: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    """Sends one message of a handler, once the client has room for it.

    A write to a client that has disconnected may fail a moment before gRPC cancels the handler, with an
    error that reads like a fault of the server: https://github.com/grpc/grpc/issues/24758

    Raises:
        CancelledError: the client has disconnected.
    """
    try:
        await context.write(response)
    except grpc.aio.InternalError:
        raise asyncio.CancelledError from None


async def discard_unread(messages: AsyncIterator[Any]) -> None:
    """Reads and drops a client's messages until it pauses, at most for 2 s.

    A Python client that is still writing when its call's status arrives reports INTERNAL instead of that
    status, so a refusal is sent only once the client has stopped: https://github.com/grpc/grpc/issues/36066
    """
    try:
        async with asyncio.timeout(_DISCARD_SECONDS):
            while True:
                async with asyncio.timeout(_PAUSE_SECONDS):
                    await anext(messages)
    except (TimeoutError, StopAsyncIteration):
        return


def is_cancelled_by_peer(call: grpc.aio.Call) -> bool:
    """Returns whether a CancelledError that `call` raised stands for a CANCELLED status of its server.

    grpc.aio raises asyncio.CancelledError for that status too, for example when the server drains; only the
    cancellation of the current task may be passed on as one: https://github.com/grpc/grpc/pull/21232
    """
    task = asyncio.current_task()
    return task is not None and not task.cancelling() and call.done()


class PeerStatus:
    """The status of a client call as its server sent it.

    When a server ends a call while a message is being written to it, grpc.aio reports INTERNAL, "Internal
    error from Core", for the failed write: in place of the server's status for a moment, or over it for good,
    depending on which arrives first. The server's status decides about retries, so it is kept here:
    https://github.com/grpc/grpc/issues/36066
    """

    def __init__(self, call: grpc.aio.Call) -> None:
        self._call = call
        self._known = asyncio.Event()
        self._error: grpc.aio.AioRpcError | None = None
        call.add_done_callback(lambda _: self._record())

    async def sent(self) -> grpc.aio.AioRpcError:
        """Returns how the call ended; it must have ended, or be about to."""
        try:
            await asyncio.wait_for(self._known.wait(), _STATUS_WAIT_SECONDS)
        except TimeoutError:
            return await self._current()
        return self._error or await self._current()

    def _record(self) -> None:
        """Records the status each time grpc.aio sets one, before it can set another."""
        status = self._current()
        try:
            status.send(None)
        except StopIteration as finished:
            if finished.value.details() != _LOCAL_DETAILS:
                self._error = self._error or finished.value
                self._known.set()
        else:
            # Behind interceptors the status is not available without waiting; `sent` waits for it.
            status.close()
            self._known.set()

    async def _current(self) -> grpc.aio.AioRpcError:
        call = self._call
        return grpc.aio.AioRpcError(
            await call.code(),
            await call.initial_metadata(),
            await call.trailing_metadata(),
            await call.details(),
        )
