"""Single flight: requests that need the same tensor at the same time share one encoding."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable
from contextlib import aclosing, suppress

from klein_services.runtime.errors import StagesLost


class LeaderLost(Exception):
    """The request whose call others followed ended before its call did."""


class Flight:
    """A call in progress: its messages so far, for the requests that follow it.

    Args:
        limit_bytes: most bytes of messages that are kept; a longer response cannot be followed to its end.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._messages: list[bytes] = []
        self._size_bytes = 0
        self._is_complete: bool | None = None
        """Whether all messages are there; `None` while the call runs."""
        self._changed = asyncio.Event()

    @property
    def is_running(self) -> bool:
        return self._is_complete is None

    def add(self, message: bytes) -> None:
        """Adds a message of the response."""
        if not self.is_running:
            return
        self._size_bytes += len(message)
        if self._size_bytes > self._limit_bytes:
            self._messages.clear()
            self.end(is_complete=False)
            return
        self._messages.append(message)
        self._notify()

    def end(self, *, is_complete: bool) -> None:
        """Ends the flight; no effect when it has ended."""
        if self.is_running:
            self._is_complete = is_complete
            self._notify()

    async def messages(self) -> AsyncIterator[bytes]:
        """Yields all messages from the first one on, each as soon as it is there.

        Raises:
            LeaderLost: the flight ended without all of them.
        """
        position = 0
        while True:
            changed = self._changed
            while position < len(self._messages):
                yield self._messages[position]
                position += 1
            if self._is_complete is False:
                raise LeaderLost
            if self._is_complete and position == len(self._messages):
                return
            await changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class SingleFlight:
    """The calls in progress that others may follow.

    The first request that needs a response makes the call, and the others follow it. When the first one fails or is
    cancelled, one of the others makes the call anew, and what it has passed on already is not repeated.

    Args:
        limit_bytes: most bytes of a response that is shared; 0 shares none.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._flights: dict[Hashable, Flight] = {}

    def is_running(self, key: Hashable) -> bool:
        """Returns whether a call with this key can be followed."""
        return key in self._flights and self._flights[key].is_running

    def __len__(self) -> int:
        """Returns the number of calls in progress."""
        return len(self._flights)

    async def messages(
        self, key: Hashable, open_call: Callable[[], AsyncGenerator[bytes, None]]
    ) -> AsyncGenerator[bytes, None]:
        """Yields the messages of the response for `key`: of a call in progress, or of a new one.

        Args:
            key: everything that determines the response, except for the times in its first message.
            open_call: makes the call, or finds its response elsewhere.

        Raises:
            StagesLost: the second call gave another response than the first, part of which is passed on.
            Exception: as the call.
        """
        passed: list[bytes] = []
        followed = False
        while self.is_running(key):
            followed = True
            with suppress(LeaderLost):
                async with aclosing(_continued(self._flights[key].messages(), passed)) as messages:
                    async for message in messages:
                        yield message
                return
        flight = Flight(self._limit_bytes)
        if self._limit_bytes:
            self._flights[key] = flight
        try:
            async with aclosing(open_call()) as response:
                shared = _shared(response, flight)
                async with aclosing(_continued(shared, passed) if followed else shared) as messages:
                    async for message in messages:
                        yield message
            flight.end(is_complete=True)
        finally:
            flight.end(is_complete=False)
            if self._flights.get(key) is flight:
                del self._flights[key]


async def _shared(response: AsyncIterator[bytes], flight: Flight) -> AsyncGenerator[bytes, None]:
    """Yields a response, each message after the followers have it."""
    async for message in response:
        flight.add(message)
        yield message


async def _continued(messages: AsyncIterator[bytes], passed: list[bytes]) -> AsyncGenerator[bytes, None]:
    """Yields messages after those in `passed`, and adds them there.

    Raises:
        StagesLost: a message differs from the one in `passed`; the first one, which has times, may.
    """
    position = 0
    async for message in messages:
        if position == len(passed):
            passed.append(message)
            yield message
        elif position and message != passed[position]:
            raise StagesLost("an encoding that was begun anew gave other bytes")
        position += 1
