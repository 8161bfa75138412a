"""Events on their way from a request's flow to its caller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from klein_api.v1.image_service_pb2 import StreamGenerateImageResponse

_EVENTS_AT_ONCE = 4


class EventQueue:
    """At most a few events: a caller that reads slowly slows its own request down, and nothing piles up."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[StreamGenerateImageResponse | None] = asyncio.Queue(_EVENTS_AT_ONCE)
        self._closed = False

    async def put(self, event: StreamGenerateImageResponse) -> None:
        """Takes an event, once there is room for it."""
        await self._events.put(event)

    def close(self) -> None:
        """Ends the iteration after the events that are there."""
        self._closed = True
        if self._events.empty():
            self._events.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[StreamGenerateImageResponse]:
        while not (self._closed and self._events.empty()):
            event = await self._events.get()
            if event is None:
                return
            yield event
