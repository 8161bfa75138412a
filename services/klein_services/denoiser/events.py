"""What happens to a request, on its way from the step loop to the request's handler."""

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


class EventChannel:
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


Message = api.DenoiseLatentsResponse | bytes
"""A message, or its serialized form where it carries much."""


class Responses:
    """Makes the messages of one request.

    Args:
        step_count: steps of the whole schedule.
        first_step: steps that were done elsewhere.
    """

    def __init__(self, step_count: int, first_step: int) -> None:
        self._step_count = step_count
        self._first_step = first_step
        self._told_step = first_step

    def of(self, event: Event) -> Iterator[Message]:
        """Yields an event's messages; tensors are cut into frames as they are taken."""
        match event:
            case Queued():
                yield api.DenoiseLatentsResponse(queued=_queued(event))
            case Started():
                started = api.DenoiseStarted(
                    queue_duration=duration(event.queue_seconds), step_count=self._step_count
                )
                yield api.DenoiseLatentsResponse(started=started)
            case StepDone():
                yield from self._step(event.step)
            case Preview():
                yield from self._step(event.step)
                yield from _frames(api.DenoiseLatentsResponse.PREVIEW_FIELD_NUMBER, [event.latents])
            case Checkpoint():
                yield from self._step(event.step)
                yield from _frames(api.DenoiseLatentsResponse.CHECKPOINT_FIELD_NUMBER, event.latents)
            case Finished():
                yield from self._finished(event)

    def _step(self, step: int) -> Iterator[Message]:
        """Yields a step once; a preview or checkpoint belongs to the last step that was sent."""
        if step > self._told_step:
            self._told_step = step
            yield api.DenoiseLatentsResponse(step=api.DenoiseStep(step=step, step_count=self._step_count))

    def _finished(self, event: Finished) -> Iterator[Message]:
        yield from _frames(api.DenoiseLatentsResponse.LATENTS_FIELD_NUMBER, event.latents)
        summary = api.DenoiseSummary(
            queue_duration=duration(event.queue_seconds),
            compute_duration=duration(event.compute_seconds),
            step_count=self._step_count - self._first_step,
        )
        yield api.DenoiseLatentsResponse(summary=summary)


def _queued(event: Queued) -> api.DenoiseQueued:
    queued = api.DenoiseQueued(position=event.position)
    if event.wait_seconds is not None:
        queued.estimated_wait.CopyFrom(duration(event.wait_seconds))
    return queued


def _frames(field_number: int, images: Sequence[Tensor]) -> Iterator[bytes]:
    for index, latents in enumerate(images):
        yield from serialized_tensor_frames(latents, FrameEnvelope(field_number, index))
