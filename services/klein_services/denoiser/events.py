"""Events of a request, the channel from the engine's thread to the handler, and their response messages."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from klein_api.v1 import denoiser_service_pb2 as api
from klein_services.runtime.frames import FrameEnvelope
from klein_services.runtime.stage import duration
from klein_services.runtime.tensors import serialized_tensor_frames


@dataclass(frozen=True)
class Queued:
    """The request waits behind `position` others."""

    position: int
    wait_seconds: float | None
    """Estimated time until it starts; `None` before such sizes were measured."""


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
    """All images' latents after `step` steps: (rows, columns, channels) each."""

    step: int
    latents: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Finished:
    """All images' final latents, (rows, columns, channels) each, and the times that they took."""

    latents: tuple[Tensor, ...]
    queue_seconds: float
    compute_seconds: float
    """From the first step to the last, pauses included."""
    device_seconds: float
    """The request's share of the device's time."""


Event = Queued | Started | StepDone | Preview | Checkpoint | Finished


class EventChannel:
    """Conflating channel of one request: it holds the newest event of each kind.

    A client that reads slowly misses intermediate events, and holds up neither the engine nor memory.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._pending: dict[type[Event], Event] = {}
        self._failure: BaseException | None = None
        self._is_signalled = False
        self._filled = asyncio.Event()

    def post(self, event: Event) -> None:
        """Adds an event and drops an unread one of the same kind. Thread-safe."""
        with self._lock:
            self._pending.pop(type(event), None)
            self._pending[type(event)] = event
            self._signal()

    def fail(self, failure: BaseException) -> None:
        """Makes `take` raise `failure` from now on. Thread-safe."""
        with self._lock:
            self._failure = failure
            self._signal()

    async def take(self) -> list[Event]:
        """Waits for events and returns them, oldest first.

        Raises:
            BaseException: the failure passed to `fail`.
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
        # One wake-up of the loop until the next `take`, however many events are posted.
        if not self._is_signalled:
            self._is_signalled = True
            self._loop.call_soon_threadsafe(self._filled.set)


Message = api.DenoiseLatentsResponse | bytes
"""A response message; those that carry tensors are serialized already."""


class Responses:
    """Converts the events of one request to response messages.

    Args:
        step_count: steps of the whole schedule.
        first_step: steps that are not run: those done before the request resumed, or left out by its strength.
    """

    def __init__(self, step_count: int, first_step: int) -> None:
        self._step_count = step_count
        self._first_step = first_step
        self._reported_step = first_step

    def messages(self, event: Event) -> Iterator[Message]:
        """Yields the messages of an event. Tensors are cut into frames lazily, one per iteration."""
        match event:
            case Queued():
                queued = api.DenoiseQueued(position=event.position)
                if event.wait_seconds is not None:
                    queued.estimated_wait.CopyFrom(duration(event.wait_seconds))
                yield api.DenoiseLatentsResponse(queued=queued)
            case Started():
                queue_duration = duration(event.queue_seconds)
                started = api.DenoiseStarted(queue_duration=queue_duration, step_count=self._step_count)
                yield api.DenoiseLatentsResponse(started=started)
            case StepDone():
                yield from self._step(event.step)
            # On the wire a preview or checkpoint belongs to the last step message before it.
            case Preview():
                yield from self._step(event.step)
                yield from _frames(api.DenoiseLatentsResponse.PREVIEW_FIELD_NUMBER, [event.latents])
            case Checkpoint():
                yield from self._step(event.step)
                yield from _frames(api.DenoiseLatentsResponse.CHECKPOINT_FIELD_NUMBER, event.latents)
            case Finished():
                yield from _frames(api.DenoiseLatentsResponse.LATENTS_FIELD_NUMBER, event.latents)
                summary = api.DenoiseSummary(
                    queue_duration=duration(event.queue_seconds),
                    compute_duration=duration(event.compute_seconds),
                    device_duration=duration(event.device_seconds),
                    step_count=self._step_count - self._first_step,
                )
                yield api.DenoiseLatentsResponse(summary=summary)

    def _step(self, step: int) -> Iterator[Message]:
        """Yields a step message unless that step was reported before."""
        if step > self._reported_step:
            self._reported_step = step
            yield api.DenoiseLatentsResponse(step=api.DenoiseStep(step=step, step_count=self._step_count))


def _frames(field_number: int, images: Sequence[Tensor]) -> Iterator[bytes]:
    for index, latents in enumerate(images):
        yield from serialized_tensor_frames(latents, FrameEnvelope(field_number, index))
