"""A bound on how many requests a server carries at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from klein_services.runtime.errors import QueueFull, ReceiveTimeout


class ConcurrencyLimit:
    """Refuses a request that finds no place, at once and before memory is taken for it.

    A worker's queue bounds only what waits for that worker; requests that are still received, or whose answer
    a slow caller has not taken, hold memory as well.

    Args:
        limit: most requests that hold a place.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken_count = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Holds a place for as long as the block runs.

        Raises:
            QueueFull: all are taken.
        """
        if self.taken_count >= self.limit:
            raise QueueFull(self.limit)
        self.taken_count += 1
        try:
            yield
        finally:
            self.taken_count -= 1


_Message = TypeVar("_Message")
_DISCARD_SECONDS = 2.0
_PAUSE_SECONDS = 0.1


async def receive(
    messages: AsyncIterator[_Message], accept: Callable[[_Message], None], *, timeout_seconds: float
) -> None:
    """Gives each message to `accept` until the caller closes its side.

    The time is for the whole stream, not for a message, so that a trickle cannot hold a place for ever.

    Raises:
        ReceiveTimeout: the stream did not end in time.
        Exception: whatever `accept` raises; what the caller is still sending then is thrown away.
    """
    iterator = aiter(messages)
    try:
        async with asyncio.timeout(timeout_seconds):
            async for message in iterator:
                accept(message)
    except TimeoutError:
        raise ReceiveTimeout(timeout_seconds) from None
    except Exception:
        await _discard(iterator)
        raise


async def _discard(iterator: AsyncIterator[_Message]) -> None:
    """Takes messages until the caller pauses.

    gRPC's Python client reports INTERNAL in place of a status that arrives while it writes.
    """
    try:
        async with asyncio.timeout(_DISCARD_SECONDS):
            while True:
                async with asyncio.timeout(_PAUSE_SECONDS):
                    await anext(iterator)
    except (TimeoutError, StopAsyncIteration):
        return
