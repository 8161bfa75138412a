"""Idempotency: requests of a caller with the same key are carried out once, and all get that one's events."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from functools import partial

from google.protobuf.message import Message

from klein_core.errors import InvalidInput
from klein_services.orchestrator.events import Event, ImageEvent
from klein_services.runtime.admission import ConcurrencyLimit
from klein_services.runtime.byte_lru import ByteLru
from klein_services.runtime.caller import caller
from klein_services.runtime.errors import QueueFull
from klein_services.runtime.metrics import CACHE_REQUESTS, initialize_caches

IDEMPOTENCY_KEY = "idempotency-key"
"""Metadata key, and the field that errors name."""
RESULT = "result"
"""Kind of the store in the metrics of caches."""
_KEY = re.compile(r"[!-~]{1,128}")
_EVENTS_AHEAD = 4
"""Events that a request may be ahead of its fastest reader."""
_Name = tuple[str, str]


@dataclass(frozen=True)
class Result:
    """All events of a request that succeeded."""

    body_digest: bytes
    events: Sequence[Event]
    size_bytes: int


class IdempotentRequests:
    """The requests with keys: those in progress, and the results of those that succeeded.

    A request goes on while any client reads it. Errors are not kept, so a retry after one is carried out anew.

    Args:
        window_seconds: time for which a result is kept; 0 turns keys off.
        limit_bytes: most bytes of all results; the least recently used ones make room. 0 turns keys off.
        slots: held by clients that get the events of another client's request, whose own slot the request itself holds.
    """

    def __init__(self, window_seconds: float, limit_bytes: int, slots: ConcurrencyLimit) -> None:
        self._slots = slots
        self._window_seconds = window_seconds
        self._results = ByteLru[_Name, Result](limit_bytes, lambda _: RESULT)
        self._running: dict[_Name, _Run] = {}
        initialize_caches((RESULT,))

    async def events(
        self, key: str | None, request: Message, carry_out: Callable[[], AsyncGenerator[Event, None]]
    ) -> AsyncGenerator[Event, None]:
        """Yields the events of a request from the first one on.

        Args:
            key: of the client; `None` carries the request out without looking for another.
            request: what the client sent.
            carry_out: makes the events.

        Raises:
            InvalidInput: the key is malformed, or belongs to another request of the caller.
            QueueFull: too many clients read already.
            Exception: the failure of the request. One that another client began is carried out anew instead, as long
                as none of its events were yielded.
        """
        if key is None or not self._window_seconds or not self._results.limit_bytes:
            async with aclosing(carry_out()) as own:
                async for event in own:
                    yield event
            return
        if not _KEY.fullmatch(key):
            raise InvalidInput.of(IDEMPOTENCY_KEY, "must have 1 to 128 visible ASCII characters")
        name, digest = (caller.get().name, key), await asyncio.to_thread(_body_digest, request)
        while True:
            result, run = self._results.get(name), self._running.get(name)
            for other in (result, run):
                if other is not None and other.body_digest != digest:
                    raise InvalidInput.of(
                        IDEMPOTENCY_KEY, "belongs to another request; use a new key for each"
                    )
            is_own = result is None and run is None
            CACHE_REQUESTS.labels(RESULT, "miss" if is_own else "hit").inc()
            if result is not None:
                with self._slots.slot():
                    for event in result.events:
                        yield event
                return
            if run is None:
                limit_bytes = self._results.limit_bytes
                run = _Run(digest, carry_out(), limit_bytes, partial(self._finish, name))
                self._running[name] = run
            has_yielded = False
            try:
                with nullcontext() if is_own else self._slots.slot():
                    async with aclosing(run.read()) as shared:
                        async for event in shared:
                            has_yielded = True
                            yield event
                return
            except QueueFull:
                raise
            except Exception:
                if is_own or has_yielded:
                    raise

    def _finish(self, name: _Name, run: _Run) -> None:
        """Forgets a request in progress, and keeps its result if it has succeeded."""
        if self._running.get(name) is run:
            del self._running[name]
        if (result := run.result()) is not None:
            self._results.put(name, result)
            asyncio.get_running_loop().call_later(self._window_seconds, self._expire, name, result)

    def _expire(self, name: _Name, result: Result) -> None:
        if self._results.get(name) is result:
            self._results.discard(name)


class _Run:
    """A request in progress, which ends with its last reader.

    Holds its events for readers that come later, until they are larger than a result may be: then no more may come, and
    what all have read is dropped.
    """

    def __init__(
        self,
        body_digest: bytes,
        events: AsyncGenerator[Event, None],
        limit_bytes: int,
        on_end: Callable[[_Run], None],
    ) -> None:
        self.body_digest = body_digest
        self._source = events
        self._limit_bytes = limit_bytes
        self._on_end = on_end
        self._events: list[Event | None] = []
        self._size_bytes = 0
        self._positions: dict[object, int] = {}
        self._changed = asyncio.Event()
        self._has_succeeded = False
        self._error: Exception | None = None
        # With the context of the client that came first: its name, and the trace.
        self._task = asyncio.create_task(self._carry_out())

    def result(self) -> Result | None:
        """Returns the events of a request that has succeeded; `None` while it runs, if it failed or is too large."""
        if not self._has_succeeded or self._size_bytes > self._limit_bytes:
            return None
        events = tuple(event for event in self._events if event is not None)
        return Result(self.body_digest, events, self._size_bytes)

    async def read(self) -> AsyncGenerator[Event, None]:
        """Yields all events. When the last reader leaves, the request is cancelled."""
        reader, position = object(), 0
        self._positions[reader] = 0
        try:
            while True:
                changed = self._changed
                while position < len(self._events):
                    if (event := self._events[position]) is not None:
                        yield event
                    position += 1
                    self._positions[reader] = position
                    self._drop_read()
                    self._notify()
                if self._error is not None:
                    raise self._error
                if self._has_succeeded and position == len(self._events):
                    return
                await changed.wait()
        finally:
            del self._positions[reader]
            if not self._positions and not self._task.done():
                if not self._has_succeeded and self._error is None:
                    # From now on the key is free, so that a client which comes back does not join what is ending.
                    self._error = asyncio.InvalidStateError("the last reader has left")
                    self._on_end(self)
                    self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)

    async def _carry_out(self) -> None:
        try:
            async with aclosing(self._source) as events:
                async for event in events:
                    self._add(event)
                    while len(self._events) - max(self._positions.values(), default=0) > _EVENTS_AHEAD:
                        await self._changed.wait()
            self._has_succeeded = True
        except asyncio.CancelledError:
            self._error = self._error or asyncio.InvalidStateError("the request was cancelled")
            raise
        except Exception as error:
            self._error = error
        finally:
            self._on_end(self)
            self._notify()

    def _add(self, event: Event) -> None:
        self._events.append(event)
        self._size_bytes += _size_bytes(event)
        if self._size_bytes > self._limit_bytes:
            self._on_end(self)
            self._drop_read()
        self._notify()

    def _drop_read(self) -> None:
        """Drops the events that all readers have got, if no more readers may come."""
        if self._size_bytes > self._limit_bytes:
            for position in range(min(self._positions.values(), default=0)):
                self._events[position] = None

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _body_digest(request: Message) -> bytes:
    """Returns a digest of the method's name and of all fields."""
    body = request.SerializeToString(deterministic=True)
    return hashlib.sha256(request.DESCRIPTOR.full_name.encode() + b"\0" + body).digest()


def _size_bytes(event: Event) -> int:
    if isinstance(event, ImageEvent):
        return event.description.ByteSize() + sum(map(len, event.chunks))
    return event.ByteSize()
