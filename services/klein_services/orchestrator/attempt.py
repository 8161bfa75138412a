"""Attempt: one pass of a request through the stages, as far as what earlier attempts left to do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable

from klein_api.v1.denoiser_service_pb2 import (
    DenoiseLatentsRequest,
    DenoiseLatentsResponse,
    DenoiseSpec,
    DenoiseSummary,
)
from klein_api.v1.image_pb2 import Adapter
from klein_api.v1.image_service_pb2 import (
    GenerationQueued,
    GenerationStep,
    StreamGenerateImageResponse,
)
from klein_services.orchestrator.backlog import Work
from klein_services.orchestrator.checkpoint_pace import CheckpointPace
from klein_services.orchestrator.decoding import FrameQueue
from klein_services.orchestrator.delivery import ImageDelivery
from klein_services.orchestrator.encoding import InputEncoder
from klein_services.orchestrator.events import EventQueue
from klein_services.orchestrator.generation_span import size_attributes
from klein_services.orchestrator.progress import GenerationOptions, Progress
from klein_services.orchestrator.request import ImageRequest
from klein_services.orchestrator.routing import DENOISER
from klein_services.orchestrator.saved_latents import latents_bytes
from klein_services.orchestrator.stage_client import (
    DENOISE_LATENTS,
    BidiStream,
    StageClient,
    StageDisagreement,
)
from klein_services.orchestrator.tensor_cache import TensorCache
from klein_services.orchestrator.timings import seconds_of
from klein_services.runtime import tracing
from klein_services.runtime.protowire import (
    as_resume_latents,
    field_number,
    indexed_frame_field,
    is_last_frame,
)

_QUEUED, _STARTED, _STEP, _PREVIEW, _CHECKPOINT, _LATENTS, _SUMMARY = range(1, 8)
"""Arms of `DenoiseLatentsResponse.event` by field number."""
_ADMISSION_SECONDS = 10.0
"""Time for a denoiser to admit or refuse a request, which takes milliseconds unless a message went astray."""


class Attempt:
    """Makes the images of a request that its client has not got.

    Args:
        request: the validated request.
        progress: what earlier attempts left; this one goes on from there.
        stages: makes the stage calls.
        cache: tensors that need not be computed again.
        events: takes each event for the client, once there is room for it.
        options: contents of events and files.
        pace: decides how often checkpoints are asked for.
    """

    def __init__(
        self,
        request: ImageRequest,
        progress: Progress,
        stages: StageClient,
        cache: TensorCache,
        events: EventQueue,
        options: GenerationOptions,
        pace: CheckpointPace,
    ) -> None:
        self._request = request
        self._progress = progress
        self._stages = stages
        self._events = events
        self._options = options
        self._pace = pace
        self._denoiser: asyncio.Future[BidiStream] = asyncio.get_running_loop().create_future()
        self._inputs = InputEncoder(
            request, stages, cache, progress.timings, self._denoiser, size_is_known=progress.size_is_known
        )
        self._images = [image for image in progress.undelivered if progress.saved.final(image) is None]
        """Images that are denoised, by their index in the denoiser's call."""
        self._latents: dict[int, FrameQueue] = {}
        self._delivery = ImageDelivery(request, progress, stages, events, options)
        self._saves_latents = False
        self._work: Work | None = None
        """The request in the denoiser's backlog, once the denoiser's call is open."""
        self._step = 0
        self._steps_run_at_start = 1.0
        self._step_at = 0.0
        self._step_seconds = 0.0

    async def run(self) -> None:
        """Encodes, denoises and decodes at once, each as soon as its input arrives and the denoiser has room for it.

        Raises:
            StagesLost: a stage cannot be used.
            InvalidInput: a reference, the initial image or the mask cannot be used, or the size that it gives.
            PeerFailure: a stage failed in another way.
            StageDisagreement: a stage broke the protocol.
            ContentDenied, ContentPolicyFailed, SigningFailed: an image may not be sent.
        """
        saved = self._progress.saved
        try:
            async with asyncio.TaskGroup() as group:
                for image in self._progress.undelivered:
                    if (frames := saved.final(image)) is not None:
                        latents = self._latents[image] = FrameQueue()
                        group.create_task(_fill(latents, frames))
                        group.create_task(self._delivery.deliver_image(image, latents))
                if self._images:
                    group.create_task(self._encode())
                    await self._denoise(group)
        except ExceptionGroup as failures:
            saved.drop_incomplete()
            if failures.subgroup(StageDisagreement):
                self._inputs.discard_cached()
            if self._events.abandoned:
                # Stage calls that our own cancellation ended may fail first, and a task group then raises their
                # errors in place of the cancellation. A further attempt would never be read.
                raise asyncio.CancelledError from None
            error: Exception = failures
            while isinstance(error, ExceptionGroup):
                # The first failure is the cause; the others came from being cancelled.
                error = error.exceptions[0]
            raise error from None
        finally:
            if self._images:
                self._progress.input_pixel_count = self._inputs.pixel_count
        if self._images:
            self._progress.prompt = self._inputs.prompt_summary

    async def _encode(self) -> None:
        """Sends the denoiser all of its input; from then on the request is part of the denoiser's backlog."""
        await self._inputs.run()
        if self._work is not None:
            params = self._progress.params
            pixel_count = params.width_px * params.height_px + self._inputs.pixel_count
            self._work.size = max(1.0, pixel_count * self._steps_run_at_start * len(self._images))
            self._work.begin()

    @property
    def _steps_run(self) -> float:
        """Steps that this attempt's denoiser runs."""
        steps, edit = self._progress.params.steps, self._request.masked_edit
        if self._progress.saved.step:
            return steps - self._progress.saved.step
        return steps if edit is None else steps * edit.strength

    async def _denoise(self, group: asyncio.TaskGroup) -> None:
        """Opens the denoiser's call as soon as the size is known and follows it to its end."""
        progress, address = self._progress, self._request.route.denoiser
        if not progress.size_is_known:
            progress.params = self._request.sized(*await self._inputs.image_size())
            progress.size_is_known = True
            tracing.annotate(size_attributes(progress.params))
        timing, backlog = progress.timings.of(DENOISER, "denoise"), self._stages.backlog
        with timing.call(), backlog.call(address, "denoise") as self._work:
            async with self._stages.stream_stream(address, DENOISE_LATENTS) as call:
                spec = self._spec()
                self._steps_run_at_start = self._steps_run
                await call.write(DenoiseLatentsRequest(spec=spec).SerializeToString())
                messages = call.messages()
                admission = await self._admission(messages)
                await self._use(call, spec)
                await self._accept(admission, group)
                async for message in messages:
                    await self._accept(message, group)
        progress.is_computing = False
        finished = sum(self._latents[image].finished for image in self._images if image in self._latents)
        if finished != len(self._images):
            raise StageDisagreement(
                f"{address.stage} at {address.target} made {finished} of {len(self._images)} images"
            )

    async def _admission(self, messages: AsyncGenerator[bytes, None]) -> bytes:
        """Returns the denoiser's first message, which it sends as soon as it has the spec."""
        address, problem = self._request.route.denoiser, "ended a call without an answer"
        try:
            async with asyncio.timeout(_ADMISSION_SECONDS):
                async for message in messages:
                    return message
        except TimeoutError:
            problem = f"did not answer within {_ADMISSION_SECONDS:g} s"
        raise StageDisagreement(f"{address.stage} at {address.target} {problem}")

    async def _use(self, call: BidiStream, spec: DenoiseSpec) -> None:
        """Begins to encode for a denoiser, whose first message shows that it has admitted the request."""
        self._progress.has_denoised = True
        if spec.resume_step:
            for index, image in enumerate(self._images):
                for frame in self._progress.saved.checkpoint(image):
                    await call.write_frame(as_resume_latents(index, frame))
        # Last, because the encoder closes the call's input when all of its tensors are sent.
        self._denoiser.set_result(call)

    def _spec(self) -> DenoiseSpec:
        """Returns the denoiser's task: the images that are left, from the last checkpoint on."""
        request, params, edit = self._request, self._progress.params, self._request.masked_edit
        size_bytes = latents_bytes(
            len(self._images), params.width_px, params.height_px, request.info.latent_channels
        )
        self._saves_latents = size_bytes <= self._options.resume_bytes
        interval = self._pace.interval_steps(request.route.name) if self._saves_latents else 0
        return DenoiseSpec(
            model=request.route.denoiser.model,
            width_px=params.width_px,
            height_px=params.height_px,
            seeds=[params.seeds[image] for image in self._images],
            step_count=params.steps,
            guidance_scale=params.guidance,
            reference_count=params.reference_count,
            priority=request.priority,
            # Previews are of the first image, which an earlier attempt may have delivered.
            preview_interval_steps=request.preview_interval_steps if self._images[0] == 0 else 0,
            checkpoint_interval_steps=interval if interval < params.steps else 0,
            resume_step=self._progress.saved.step,
            adapters=[Adapter(name=adapter.name, scale=adapter.scale) for adapter in params.adapters],
            strength=None if edit is None else edit.strength,
        )

    async def _accept(self, message: bytes, group: asyncio.TaskGroup) -> None:
        """Handles one of the denoiser's messages; ignores kinds that the orchestrator does not use."""
        arm = field_number(message)
        if arm in (_LATENTS, _PREVIEW, _CHECKPOINT):
            parts = indexed_frame_field(message)
            if parts is None or not 0 <= parts[0] < len(self._images):
                address = self._request.route.denoiser
                raise StageDisagreement(f"{address.stage} at {address.target} sent a frame of no image")
            image, frame = self._images[parts[0]], parts[1]
            if arm == _LATENTS:
                await self._relay_latents(image, frame, group)
            elif arm == _CHECKPOINT:
                self._save_checkpoint(image, frame)
            elif image == 0:
                await self._relay_preview(frame, group)
        elif arm == _SUMMARY:
            self._report_summary(DenoiseLatentsResponse.FromString(message).summary)
        elif arm == _STARTED:
            self._progress.is_computing = True
            self._step_at = time.perf_counter()
        elif arm == _STEP:
            await self._report_step(DenoiseLatentsResponse.FromString(message), group)
        elif arm == _QUEUED and self._options.reports_progress and not self._progress.reported_step:
            await self._events.put(_queued(DenoiseLatentsResponse.FromString(message)))

    def _report_summary(self, summary: DenoiseSummary) -> None:
        compute_seconds = self._progress.timings.of(DENOISER, "denoise").report(summary)
        if self._work is not None:
            has_share = summary.HasField("device_duration")
            self._work.measured(seconds_of(summary.device_duration) if has_share else compute_seconds)

    async def _report_step(self, response: DenoiseLatentsResponse, group: asyncio.TaskGroup) -> None:
        """Reports a step to the client, unless an earlier attempt did."""
        self._step = response.step.step
        now = time.perf_counter()
        self._step_at, self._step_seconds = now, now - self._step_at
        if self._work is not None:
            steps_left = self._progress.params.steps - self._step
            self._work.share_left = min(1.0, steps_left / self._steps_run_at_start)
        if self._options.reports_progress and self._step > self._progress.reported_step:
            self._progress.reported_step = self._step
            step = GenerationStep(step=self._step, step_count=response.step.step_count)
            await self._events.put(StreamGenerateImageResponse(step=step))
        # The decoder's call is opened at the last step, because the latents follow in a moment. Not before the
        # client has got the step: one that reads slowly would let the decoder wait too long.
        if self._step == self._progress.params.steps and self._images[0] not in self._latents:
            self._begin_decoding(self._images[0], group)

    def _save_checkpoint(self, image: int, frame: bytes) -> None:
        if self._saves_latents and self._progress.saved.add_checkpoint(
            image, frame, self._step, self._images
        ):
            self._progress.marks += 1
            self._pace.record(
                self._request.route.name, time.perf_counter() - self._step_at, self._step_seconds
            )

    async def _relay_latents(self, image: int, frame: bytes, group: asyncio.TaskGroup) -> None:
        latents = self._latents.get(image) or self._begin_decoding(image, group)
        if self._saves_latents:
            self._progress.saved.add_final(image, frame)
        await latents.put(frame)
        if is_last_frame(frame):
            await latents.finish()

    def _begin_decoding(self, image: int, group: asyncio.TaskGroup) -> FrameQueue:
        latents = self._latents[image] = FrameQueue()
        group.create_task(self._delivery.deliver_image(image, latents))
        return latents

    async def _relay_preview(self, frame: bytes, group: asyncio.TaskGroup) -> None:
        """Relays a preview; drops one that begins while the last is still being decoded."""
        delivery = self._delivery
        if delivery.preview is None or delivery.preview_latents.finished:
            latents = delivery.preview_latents = FrameQueue()
            if delivery.preview is None or delivery.preview.done():
                delivery.preview = group.create_task(delivery.deliver_preview(latents, self._step))
            else:
                latents.abandon()
        await delivery.preview_latents.put(frame)
        if is_last_frame(frame):
            await delivery.preview_latents.finish()


async def _fill(latents: FrameQueue, frames: Iterable[bytes]) -> None:
    """Puts a whole tensor into a queue."""
    for frame in frames:
        await latents.put(frame)
    await latents.finish()


def _queued(response: DenoiseLatentsResponse) -> StreamGenerateImageResponse:
    """Returns the client's event for the denoiser's queue position."""
    queued = GenerationQueued(position=response.queued.position)
    if response.queued.HasField("estimated_wait"):
        queued.estimated_wait.CopyFrom(response.queued.estimated_wait)
    return StreamGenerateImageResponse(queued=queued)
