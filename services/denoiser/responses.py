"""A request's events as messages of the API."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from klein_api.v1 import denoiser_service_pb2 as api
from services.denoiser.outbox import Checkpoint, Event, Finished, Preview, Queued, Started, StepDone
from services.runtime.frames import FrameEnvelope
from services.runtime.stages import duration
from services.runtime.tensors import serialised_tensor_frames

Message = api.DenoiseLatentsResponse | bytes
"""A message, or its serialised form where it carries much."""


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
                yield from _frames(api.DenoiseLatentsResponse.PREVIEW_FIELD_NUMBER, [event.latents])
            case Checkpoint():
                yield from self._step(event.step)
                yield from _frames(api.DenoiseLatentsResponse.CHECKPOINT_FIELD_NUMBER, event.latents)
            case Finished():
                yield from self._finished(event)

    def _step(self, step: int) -> Iterator[Message]:
        """Tells a step once; a checkpoint belongs to the step that was told last."""
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
        yield from serialised_tensor_frames(latents, FrameEnvelope(field_number, index))
