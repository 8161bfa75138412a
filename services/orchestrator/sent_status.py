"""The status that a peer sent, also where grpc.aio loses it."""

from __future__ import annotations

import asyncio

import grpc

_LOCAL = "Internal error from Core"
_LATEST_SECONDS = 1.0


class SentStatus:
    """Keeps the status of a call as its peer sent it.

    When a peer ends a call while a message is being written to it, grpc.aio reports INTERNAL, "Internal error
    from Core", for the failed write: in place of the peer's status for a moment, or over it for good, as the
    two happen to arrive. Callers need the peer's: a full queue is to be retried, a fault of ours is not.
    """

    def __init__(self, call: grpc.aio.Call) -> None:
        self._call = call
        self._known = asyncio.Event()
        self._error: grpc.aio.AioRpcError | None = None
        call.add_done_callback(lambda _: self._note())

    async def sent(self) -> grpc.aio.AioRpcError:
        """Returns how the call ended; it must have, or be about to."""
        try:
            await asyncio.wait_for(self._known.wait(), _LATEST_SECONDS)
        except TimeoutError:
            return await self._current()
        return self._error or await self._current()

    def _note(self) -> None:
        """Takes the status whenever grpc.aio sets one, before it can set another."""
        status = self._current()
        try:
            status.send(None)
        except StopIteration as finished:
            if finished.value.details() != _LOCAL:
                self._error = self._error or finished.value
                self._known.set()
        else:
            # Behind interceptors a status cannot be had at once, and is asked for when it is needed.
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
