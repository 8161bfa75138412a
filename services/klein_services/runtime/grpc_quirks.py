"""Workarounds for behavior of grpc.aio, each with what it works around."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

_DISCARD_SECONDS = 2.0
_PAUSE_SECONDS = 0.1


async def discard_unread(messages: AsyncIterator[Any]) -> None:
    """Reads and drops a client's messages until it pauses, at most for 2 s.

    A Python client that is still writing when its call's status arrives reports INTERNAL instead of that
    status, so a refusal is sent only once the client has stopped.
    """
    try:
        async with asyncio.timeout(_DISCARD_SECONDS):
            while True:
                async with asyncio.timeout(_PAUSE_SECONDS):
                    await anext(messages)
    except (TimeoutError, StopAsyncIteration):
        return
