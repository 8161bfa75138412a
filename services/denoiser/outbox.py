"""What happens to a request, on its way from the step loop to the request's handler."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Queued:
    """The request waits behind `position` others."""

    position: int
    wait_seconds: float | None
    """Until it starts; `None` when nothing was measured."""


@dataclass(frozen=True)
class Started:
    """The first step begins."""

    queue_seconds: float


@dataclass(frozen=True)
class StepDone:
    """All images have done `step` steps."""

    step: int


@dataclass(frozen=True, eq=False)
class Preview:
    """The first image's clean latents as estimated after `step` steps: (rows, columns, channels)."""

    step: int
    latents: Tensor


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Every image's latents after `step` steps: (rows, columns, channels) each."""

    step: int
    latents: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Finished:
    """Every image's final latents, (rows, columns, channels) each, and what they cost."""

    latents: tuple[Tensor, ...]
    queue_seconds: float
    compute_seconds: float


Event = Queued | Started | StepDone | Preview | Checkpoint | Finished


class Outbox:
    """Events of one request: at most one of each kind, so a slow reader costs neither time nor memory."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._pending: dict[type[Event], Event] = {}
        self._failure: BaseException | None = None
        self._is_signalled = False
        self._filled = asyncio.Event()

    def post(self, event: Event) -> None:
        """Adds an event, in place of an older one of its kind. For any thread."""
        with self._lock:
            self._pending.pop(type(event), None)
            self._pending[type(event)] = event
            self._signal()

    def fail(self, failure: BaseException) -> None:
        """Ends the request with an error. For any thread."""
        with self._lock:
            self._failure = failure
            self._signal()

    async def take(self) -> list[Event]:
        """Waits for events and returns them, oldest first.

        Raises:
            BaseException: whatever the request failed with.
        """
        await self._filled.wait()
        with self._lock:
            self._filled.clear()
            self._is_signalled = False
            if self._failure is not None:
                raise self._failure
            events = list(self._pending.values())
            self._pending.clear()
        return events

    def _signal(self) -> None:
        if not self._is_signalled:
            self._is_signalled = True
            self._loop.call_soon_threadsafe(self._filled.set)
