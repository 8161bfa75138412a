"""Bound on the number of requests that a server holds at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from klein_services.runtime.errors import QueueFull, ReceiveTimeout
from klein_services.runtime.grpc_quirks import discard_unread

_Message = TypeVar("_Message")


class ConcurrencyLimit:
    """A semaphore that never waits: a request that finds no free slot is refused at once.

    A worker's queue bounds only what waits for that worker. Requests that are still being received, or whose
    answer a slow client has not read, hold memory as well, and those are what this bounds.

    Args:
        limit: number of slots.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_use = 0
        """Slots that are taken."""

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Holds a slot while the block runs.

        Raises:
            QueueFull: all slots are taken.
        """
        if self.in_use >= self.limit:
            raise QueueFull(self.limit)
        self.in_use += 1
        try:
            yield
        finally:
            self.in_use -= 1


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
        await discard_unread(iterator)
        raise
