"""Receiving a request that is a stream, within a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from services.runtime.errors import ReceiveTimeout

_Message = TypeVar("_Message")


async def receive(
    messages: AsyncIterator[_Message], accept: Callable[[_Message], None], *, timeout_seconds: float
) -> None:
    """Gives each message to `accept` until the caller closes its side.

    The time is for the whole stream, not for a message, so that a trickle cannot hold a place for ever.

    Raises:
        ReceiveTimeout: the stream did not end in time.
        Exception: whatever `accept` raises; nothing more is received then.
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            async for message in messages:
                accept(message)
    except TimeoutError:
        raise ReceiveTimeout(timeout_seconds) from None
