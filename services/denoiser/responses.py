"""A request's events as messages of the API."""

from __future__ import annotations

from collections.abc import Iterator

from klein_api.v1 import denoiser_service_pb2 as api
from klein_api.v1 import tensor_pb2

from services.denoiser.outbox import Checkpoint, Event, Finished, Preview, Queued, Started, StepDone
from services.runtime.stages import duration
from services.runtime.tensors import tensor_frames


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

    def of(self, event: Event) -> Iterator[api.DenoiseLatentsResponse]:
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
                for frame in tensor_frames(event.latents):
                    yield api.DenoiseLatentsResponse(preview=_indexed(0, frame))
            case Checkpoint():
                yield from self._step(event.step)
                for index, latents in enumerate(event.latents):
                    for frame in tensor_frames(latents):
                        yield api.DenoiseLatentsResponse(checkpoint=_indexed(index, frame))
            case Finished():
                yield from self._finished(event)

    def _step(self, step: int) -> Iterator[api.DenoiseLatentsResponse]:
        """Tells a step once; a checkpoint belongs to the step that was told last."""
        if step > self._told_step:
            self._told_step = step
            yield api.DenoiseLatentsResponse(step=api.DenoiseStep(step=step, step_count=self._step_count))

    def _finished(self, event: Finished) -> Iterator[api.DenoiseLatentsResponse]:
        for index, latents in enumerate(event.latents):
            for frame in tensor_frames(latents):
                yield api.DenoiseLatentsResponse(latents=_indexed(index, frame))
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


def _indexed(index: int, frame: tensor_pb2.TensorFrame) -> api.IndexedTensorFrame:
    return api.IndexedTensorFrame(index=index, frame=frame)
