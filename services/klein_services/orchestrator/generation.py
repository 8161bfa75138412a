"""One request in progress: its stage calls, the tensors between them and the events for its client."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from klein_api.v1.denoiser_service_pb2 import DenoiseLatentsRequest, DenoiseLatentsResponse, DenoiseSpec
from klein_api.v1.image_pb2 import Adapter, ImageFormat
from klein_api.v1.image_service_pb2 import (
    GeneratedImage,
    GenerationQueued,
    GenerationStep,
    GenerationSummary,
    StreamGenerateImageResponse,
)
from klein_api.v1.vae_decoder_service_pb2 import DecodeSpec
from klein_core.image_format import DIGITAL_SOURCE_TYPE
from klein_services.orchestrator.backlog import Work
from klein_services.orchestrator.decoding import DecodedImage, FrameQueue, decode_latents
from klein_services.orchestrator.encoding import InputEncoder, TensorCache
from klein_services.orchestrator.events import EventQueue, ImageEvent
from klein_services.orchestrator.generation_span import size_attributes
from klein_services.orchestrator.image_release import ImageRelease
from klein_services.orchestrator.manifest_signer import SigningFailed
from klein_services.orchestrator.masked_edit import MaskedEdit
from klein_services.orchestrator.provenance import digital_source_type
from klein_services.orchestrator.request import ImageRequest
from klein_services.orchestrator.routing import DENOISER, VAE_DECODER
from klein_services.orchestrator.stage_client import (
    DENOISE_LATENTS,
    BidiStream,
    StageClient,
    StageDisagreement,
)
from klein_services.orchestrator.stage_directory import StageDirectory
from klein_services.orchestrator.timings import Timings, seconds_of
from klein_services.runtime import tracing
from klein_services.runtime.errors import ServiceError, StagesLost
from klein_services.runtime.logs import request_id
from klein_services.runtime.protowire import field_number, indexed_frame_field, is_last_frame
from klein_services.runtime.stage import duration

_PREVIEW_QUALITY = 85
_QUEUED, _STEP, _PREVIEW, _LATENTS, _SUMMARY = 1, 3, 4, 6, 7
"""Arms of `DenoiseLatentsResponse.event` by field number."""
_log = logging.getLogger("klein.orchestrator")


@dataclass(frozen=True)
class GenerationOptions:
    """Contents of a request's events and image files."""

    reports_progress: bool = True
    """Whether queue positions and steps become events."""
    image_metadata: bool = True
    """Whether the seed, model and steps are stored in the image files."""
    release: ImageRelease = field(default_factory=ImageRelease)
    """Passed by every image before the client gets it."""
    warnings: tuple[str, ...] = ()
    """Sentences for the client besides those of the request."""
    arrived_at: float = field(default_factory=time.perf_counter)
    """Reading of `time.perf_counter()` when the request came."""


class Generation:
    """Makes the images of one request.

    Args:
        request: the validated request.
        stages: makes the stage calls.
        directory: forgets the request's stages when one is lost.
        cache: tensors that need not be computed again.
        events: takes each event for the client, once there is room for it.
        options: contents of events and files.
    """

    def __init__(
        self,
        request: ImageRequest,
        stages: StageClient,
        directory: StageDirectory,
        cache: TensorCache,
        events: EventQueue,
        options: GenerationOptions,
    ) -> None:
        self._request = request
        self._params = request.params
        self._stages = stages
        self._directory = directory
        self._cache = cache
        self._events = events
        self._options = options
        self._timings = Timings()
        self._denoising: Work | None = None
        """The request in the denoiser's backlog, once the denoiser's call is open."""
        self._denoiser: asyncio.Future[BidiStream] = asyncio.get_running_loop().create_future()
        self._inputs = InputEncoder(request, stages, cache, self._timings, self._denoiser)
        self._latents: dict[int, FrameQueue] = {}
        self._preview: asyncio.Task[None] | None = None
        self._preview_latents = FrameQueue()
        self._step = 0
        self._output_pixel_count = 0

    async def run(self) -> None:
        """Makes the images; once more from the start if a stage is lost before the client has got an event.

        Raises:
            StagesLost: a stage cannot be used.
            InvalidInput: a reference, the initial image or the mask cannot be used, or the size that it gives.
            PeerFailure: a stage failed in another way.
            StageDisagreement: a stage broke the protocol.
            ContentDenied, ContentPolicyFailed, SigningFailed: an image may not be sent.
        """
        try:
            summary = await self._attempt()
        except StagesLost:
            self._directory.forget(self._request.route)
            if self._events.was_used:
                raise
            _log.warning("a stage was lost; the request is made again", exc_info=True)
            # The stages may have other weights than before.
            info = await self._directory.describe_route(
                self._request.route, self._stages.deadline.remaining_seconds()
            )
            if not info.accepts_same_requests(self._request.info):
                name = self._request.route.name
                raise StagesLost(f"another model took the place of {name!r} meanwhile; ask again") from None
            again = replace(self._request, info=info)
            summary = await Generation(
                again, self._stages, self._directory, self._cache, self._events, self._options
            )._attempt()
        await self._events.put(StreamGenerateImageResponse(summary=summary))

    @property
    def asked_pixel_count(self) -> int:
        """Pixels that the stages were asked for so far: of the input images, and of all images once denoising began."""
        output = self._params.width_px * self._params.height_px * len(self._params.seeds)
        return self.input_pixel_count + (output if self._denoiser.done() else 0)

    @property
    def input_pixel_count(self) -> int:
        """Pixels of the initial image and the references that are encoded."""
        return self._inputs.pixel_count

    async def _attempt(self) -> GenerationSummary:
        """Encodes, denoises and decodes at once, each as soon as its input arrives."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._encode())
                await self._denoise(group)
        except ExceptionGroup as failures:
            if failures.subgroup(StageDisagreement):
                self._inputs.discard_cached()
            if self._events.abandoned:
                # Stage calls that our own cancellation ended may fail first, and a task group then raises their
                # errors in place of the cancellation. A second attempt would never be read.
                raise asyncio.CancelledError from None
            error: Exception = failures
            while isinstance(error, ExceptionGroup):
                # The first failure is the cause; the others came from being cancelled.
                error = error.exceptions[0]
            raise error from None
        return self._summary()

    async def _encode(self) -> None:
        """Sends the denoiser all of its input; from then on the request is part of the denoiser's backlog."""
        await self._inputs.run()
        if self._denoising is not None:
            params, edit = self._params, self._request.masked_edit
            pixel_count = params.width_px * params.height_px + self._inputs.pixel_count
            steps = params.steps if edit is None else params.steps * edit.strength
            self._denoising.size = max(1.0, pixel_count * steps * len(params.seeds))
            self._denoising.begin()

    async def _denoise(self, group: asyncio.TaskGroup) -> None:
        """Opens the denoiser's call as soon as the size is known and follows it to its end."""
        if not self._request.size_is_known:
            self._params = self._request.sized(*await self._inputs.image_size())
            tracing.annotate(size_attributes(self._params))
        address, params, edit = self._request.route.denoiser, self._params, self._request.masked_edit
        spec = DenoiseSpec(
            model=address.model,
            width_px=params.width_px,
            height_px=params.height_px,
            seeds=params.seeds,
            step_count=params.steps,
            guidance_scale=params.guidance,
            reference_count=params.reference_count,
            priority=self._request.priority,
            preview_interval_steps=self._request.preview_interval_steps,
            adapters=[Adapter(name=adapter.name, scale=adapter.scale) for adapter in params.adapters],
            strength=None if edit is None else edit.strength,
        )
        timing, backlog = self._timings.of(DENOISER, "denoise"), self._stages.backlog
        with timing.call(), backlog.call(address, "denoise") as self._denoising:
            async with self._stages.stream_stream(address, DENOISE_LATENTS) as call:
                await call.write(DenoiseLatentsRequest(spec=spec).SerializeToString())
                self._denoiser.set_result(call)
                async for message in call.messages():
                    await self._accept(message, group)
        finished = sum(latents.finished for latents in self._latents.values())
        if finished != len(params.seeds):
            raise StageDisagreement(
                f"{address.stage} at {address.target} made {finished} of {len(params.seeds)} images"
            )

    async def _accept(self, message: bytes, group: asyncio.TaskGroup) -> None:
        """Handles one of the denoiser's messages; ignores kinds that the orchestrator does not use."""
        arm = field_number(message)
        if arm in (_LATENTS, _PREVIEW):
            parts = indexed_frame_field(message)
            if parts is None or not 0 <= parts[0] < len(self._params.seeds):
                address = self._request.route.denoiser
                raise StageDisagreement(f"{address.stage} at {address.target} sent a frame of no image")
            index, frame = parts
            if arm == _LATENTS:
                latents = self._latents.get(index) or self._begin_decoding(index, group)
                await latents.put(frame)
                if is_last_frame(frame):
                    await latents.finish()
            elif index == 0:
                await self._relay_preview(frame, group)
        elif arm == _SUMMARY:
            summary = DenoiseLatentsResponse.FromString(message).summary
            compute_seconds = self._timings.of(DENOISER, "denoise").report(summary)
            if self._denoising is not None:
                has_share = summary.HasField("device_duration")
                self._denoising.measured(
                    seconds_of(summary.device_duration) if has_share else compute_seconds
                )
        elif arm in (_QUEUED, _STEP):
            response = DenoiseLatentsResponse.FromString(message)
            self._step = response.step.step or self._step
            if self._denoising is not None:
                edit, steps = self._request.masked_edit, self._params.steps
                run_here = steps if edit is None else steps * edit.strength
                self._denoising.share_left = min(1.0, (steps - self._step) / run_here)
            if self._options.reports_progress:
                await self._events.put(_progress(response))
            # The decoder's call is opened at the last step, because the latents follow in a moment. Not before the
            # client has got the step: one that reads slowly would let the decoder wait too long.
            if self._step == self._params.steps and 0 not in self._latents:
                self._begin_decoding(0, group)

    def _begin_decoding(self, index: int, group: asyncio.TaskGroup) -> FrameQueue:
        latents = self._latents[index] = FrameQueue()
        group.create_task(self._decode_image(index, latents))
        return latents

    async def _relay_preview(self, frame: bytes, group: asyncio.TaskGroup) -> None:
        """Relays a preview; drops one that begins while the last is still being decoded."""
        if self._preview is None or self._preview_latents.finished:
            self._preview_latents = FrameQueue()
            if self._preview is None or self._preview.done():
                self._preview = group.create_task(self._decode_preview(self._preview_latents, self._step))
            else:
                self._preview_latents.abandon()
        await self._preview_latents.put(frame)
        if is_last_frame(frame):
            await self._preview_latents.finish()

    async def _decode_image(self, index: int, latents: FrameQueue) -> None:
        params, metadata = self._params, dict(self._request.embedded_prompts)
        edit = self._request.masked_edit
        if self._options.image_metadata:
            metadata["model"] = self._request.route.name
            metadata[DIGITAL_SOURCE_TYPE] = digital_source_type(self._request)
            metadata["seed"], metadata["steps"] = str(params.seeds[index]), str(params.steps)
            if edit is not None:
                metadata["strength"] = f"{edit.strength:g}"
            if params.adapters:
                metadata["adapters"] = ", ".join(f"{each.name}:{each.scale:g}" for each in params.adapters)
        spec = DecodeSpec(
            model=self._request.route.vae_decoder.model,
            format=self._request.format,
            quality=self._request.quality,
            metadata=metadata,
        )
        image = await self._decode(spec, latents, edit if edit is not None and edit.has_overlay else None)
        description = self._description(index, image)
        chunks = await self._released(description, image)
        self._output_pixel_count += image.summary.width_px * image.summary.height_px
        if index == 0 and self._preview is not None:
            # A preview of a finished image is of no use.
            self._preview.cancel()
            self._preview_latents.abandon()
        await self._events.put(ImageEvent(description, chunks))

    async def _decode_preview(self, latents: FrameQueue, step: int) -> None:
        """Decodes the preview after `step` steps. A failure is only logged, because the next one may succeed."""
        spec = DecodeSpec(
            model=self._request.route.vae_decoder.model,
            format=ImageFormat.IMAGE_FORMAT_JPEG,
            quality=_PREVIEW_QUALITY,
        )
        try:
            image = await self._decode(spec, latents)
            description = self._description(0, image)
            description.step = step
            chunks = await self._released(description, image)
        except (ServiceError, StageDisagreement, SigningFailed) as error:
            _log.warning("no preview: %s", error)
            latents.abandon()
        else:
            await self._events.put(ImageEvent(description, chunks, is_preview=True))

    async def _decode(
        self, spec: DecodeSpec, latents: FrameQueue, overlay: MaskedEdit | None = None
    ) -> DecodedImage:
        timing = self._timings.of(VAE_DECODER, "decode")
        address = self._request.route.vae_decoder
        pixel_count = self._params.width_px * self._params.height_px
        return await decode_latents(
            self._stages, address, spec, latents.frames(), timing, pixel_count, overlay
        )

    async def _released(self, description: GeneratedImage, image: DecodedImage) -> Sequence[memoryview]:
        return await self._options.release.released(
            self._request, description, self._params.steps, image.chunks, self._stages.deadline
        )

    def _description(self, index: int, image: DecodedImage) -> GeneratedImage:
        return GeneratedImage(
            index=index,
            seed=self._params.seeds[index],
            width_px=image.summary.width_px,
            height_px=image.summary.height_px,
            format=image.summary.format,
        )

    def _summary(self) -> GenerationSummary:
        params, prompt = self._params, self._inputs.prompt_summary
        return GenerationSummary(
            request_id=request_id.get(),
            model=self._request.route.name,
            flow=self._request.flow,
            prompt_token_count=prompt.token_count,
            prompt_truncated=prompt.truncated,
            input_megapixels=self._inputs.pixel_count / 1e6,
            output_megapixels=self._output_pixel_count / 1e6,
            step_count=params.steps,
            guidance_scale=params.guidance,
            stage_timings=self._timings.messages(),
            total_duration=duration(time.perf_counter() - self._options.arrived_at),
            warnings=[*self._request.warnings, *self._options.warnings],
        )


def _progress(response: DenoiseLatentsResponse) -> StreamGenerateImageResponse:
    """Returns the client's event for the denoiser's queue position or step."""
    if response.HasField("step"):
        step = GenerationStep(step=response.step.step, step_count=response.step.step_count)
        return StreamGenerateImageResponse(step=step)
    queued = GenerationQueued(position=response.queued.position)
    if response.queued.HasField("estimated_wait"):
        queued.estimated_wait.CopyFrom(response.queued.estimated_wait)
    return StreamGenerateImageResponse(queued=queued)
