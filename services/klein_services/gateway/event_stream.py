"""Response of server-sent events that ends with its client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

KEEP_ALIVE_SECONDS = 15.0
"""Time without an event after which a comment is sent: proxies close connections that are silent for long."""
ServerSentEvent = tuple[str, Mapping[str, Any]]
"""Type of an event and its data."""


class EventStream(Response):
    """Sends events as they come. A client that disconnects cancels the work that they come from.

    Args:
        events: closed when the response ends, however it ends.
        keep_alive_seconds: see `KEEP_ALIVE_SECONDS`.
        headers: further headers.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[ServerSentEvent, None],
        *,
        keep_alive_seconds: float = KEEP_ALIVE_SECONDS,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            headers={"cache-control": "no-store", "x-accel-buffering": "no"} | dict(headers or {})
        )
        # The length is not known, and Response has set it to 0.
        del self.headers["content-length"]
        self._events = events
        self._keep_alive_seconds = keep_alive_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs until the events end or the client leaves."""
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                await sending
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            waiting = asyncio.ensure_future(anext(events, None))
            try:
                while True:
                    await asyncio.wait((waiting,), timeout=self._keep_alive_seconds)
                    if not waiting.done():
                        await send(_body(b": waiting\n\n", more=True))
                        continue
                    if (event := waiting.result()) is None:
                        break
                    kind, data = event
                    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
                    await send(_body(f"event: {kind}\ndata: {text}\n\n".encode(), more=True))
                    waiting = asyncio.ensure_future(anext(events, None))
            finally:
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
        await send(_body(b"", more=False))


def _body(content: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
