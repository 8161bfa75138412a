"""HTTP/1.1 of a connection: uvicorn's, with a bound on the time until a request's headers are there."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_BYTES = 32 << 10
"""Most bytes of a request's line and headers."""


def protocol_class(header_timeout_seconds: float) -> type[H11Protocol]:
    """Returns a protocol that closes connections whose next request's headers take longer than that.

    uvicorn itself waits for them without end: a client that sends a byte a minute would hold its connection for ever.
    """

    class BoundedProtocol(H11Protocol):
        """A connection."""

        _header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._start_timer()

        def data_received(self, data: bytes) -> None:
            cycle_before = self.cycle
            super().data_received(data)
            if self.cycle is not cycle_before:
                self._stop_timer()
            elif self._header_timer is None and (self.cycle is None or self.cycle.response_complete):
                # The first bytes of the next request on a connection that is kept.
                self._start_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def _start_timer(self) -> None:
            self._header_timer = self.loop.call_later(header_timeout_seconds, self.transport.close)

        def _stop_timer(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

    return BoundedProtocol
