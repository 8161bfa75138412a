"""Latents relayed into a vae-decoder, and the image that comes back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from klein_api.v1.denoiser_service_pb2 import DenoiseLatentsRequest, DenoiseLatentsResponse, DenoiseSpec
from klein_api.v1.image_pb2 import Adapter, ImageFormat
from klein_api.v1.image_service_pb2 import (
    GeneratedImage,
    GenerationQueued,
    GenerationStep,
    GenerationSummary,
    StreamGenerateImageResponse,
)
from klein_api.v1.vae_decoder_service_pb2 import (
    DecodeLatentsRequest,
    DecodeLatentsResponse,
    DecodeSpec,
    DecodeSummary,
)
from klein_core.params import GenerationParams
from klein_services.orchestrator.cache import TensorCache
from klein_services.orchestrator.conditioning import Conditioning, DenoiseInput
from klein_services.orchestrator.events import Event, ImageEvent
from klein_services.orchestrator.relay import FrameQueue, Hop
from klein_services.orchestrator.request import ImageRequest
from klein_services.orchestrator.routing import DENOISER, VAE_DECODER, StageAddress
from klein_services.orchestrator.stage_client import (
    DECODE_LATENTS,
    DENOISE_LATENTS,
    BidiStream,
    StageClient,
    StageDisagreement,
)
from klein_services.orchestrator.timings import OperationTiming, Timings
from klein_services.runtime.errors import ServiceError
from klein_services.runtime.logs import request_id
from klein_services.runtime.protowire import chunk_of, field_number, indexed_frame_field, is_last_frame
from klein_services.runtime.stage import duration

_IMAGE_BYTES_LIMIT = 64 << 20
"""Most bytes of one encoded image; unencoded, 4 megapixels are 12 MiB."""


@dataclass(frozen=True)
class DecodedImage:
    """An encoded image and what the stage says of it."""

    summary: DecodeSummary
    chunks: list[memoryview]


async def decode_latents(
    calls: StageClient,
    address: StageAddress,
    spec: DecodeSpec,
    frames: AsyncIterator[bytes],
    timing: OperationTiming,
) -> DecodedImage:
    """Decodes one image while its latents are still arriving.

    Args:
        calls: opens the call.
        address: the vae-decoder.
        spec: how the image is to be encoded.
        frames: the latents' frames, as `wire` moves them.
        timing: where the call is counted.
    """
    with timing.call():
        async with calls.open(address, DECODE_LATENTS) as call:
            await call.write(DecodeLatentsRequest(spec=spec).SerializeToString())
            hop = Hop(DENOISER, address.stage)
            async for frame in frames:
                hop.add(frame)
                await call.write(frame)
            await call.done_writing()
            hop.finish()
            image = await _received(call)
    timing.report(image.summary)
    return image


async def _received(call: BidiStream) -> DecodedImage:
    summary: DecodeSummary | None = None
    chunks: list[memoryview] = []
    missing = 0
    hop = Hop(call.address.stage, "orchestrator")
    async for message in call.messages():
        if summary is None:
            summary = DecodeLatentsResponse.FromString(message).summary
            missing = summary.size_bytes
        else:
            chunk = chunk_of(message)
            if chunk is None:
                break
            chunks.append(chunk)
            missing -= len(chunk)
            hop.add(message)
        if not 0 <= missing <= _IMAGE_BYTES_LIMIT:
            break
    if summary is None or missing:
        raise StageDisagreement(
            f"{call.address.stage} at {call.address.target} did not send the image it announced"
        )
    hop.finish()
    return DecodedImage(summary, chunks)


Emit = Callable[[Event], Awaitable[None]]
_PREVIEW_QUALITY = 85
_QUEUED, _STEP, _PREVIEW, _LATENTS, _SUMMARY = 1, 3, 4, 6, 7
"""Arms of `DenoiseLatentsResponse.event` by field number."""
_log = logging.getLogger("klein.orchestrator")


@dataclass(frozen=True)
class FlowOptions:
    """What the caller and the operator want to hear and to have stored."""

    tells_progress: bool = True
    """Whether queue positions and steps become events."""
    image_metadata: bool = True
    """Whether the seed, model and steps are stored in the image files."""
    arrived_at: float = field(default_factory=time.perf_counter)
    """Reading of `time.perf_counter()` when the request came."""


class Flow:
    """Carries out one request.

    Args:
        request: what is to be made.
        calls: opens the stage calls.
        cache: tensors that need not be made again.
        emit: takes each event for the caller, once there is room for it.
        options: what else is wanted.
    """

    def __init__(
        self,
        request: ImageRequest,
        calls: StageClient,
        cache: TensorCache,
        emit: Emit,
        options: FlowOptions,
    ) -> None:
        self._request = request
        self._params = request.params
        self._calls = calls
        self._emit = emit
        self._options = options
        self._timings = Timings()
        self._denoise_input = DenoiseInput()
        self._conditioning = Conditioning(request, calls, cache, self._timings, self._denoise_input)
        self._latents: dict[int, FrameQueue] = {}
        self._preview: asyncio.Task[None] | None = None
        self._preview_latents = FrameQueue()
        self._step = 0

    async def run(self) -> GenerationSummary:
        """Makes the images.

        Raises:
            ExceptionGroup: of whatever a stage failed with; everything else has been cancelled by then.
        """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._conditioning.run())
                await self._denoise(group)
        except* StageDisagreement:
            self._conditioning.forget()
            raise
        return self._summary()

    async def _denoise(self, group: asyncio.TaskGroup) -> None:
        """Opens the denoiser's call as soon as the size is known and follows it to its end."""
        if not self._request.size_is_known:
            self._params = self._request.sized(*await self._conditioning.first_reference_size())
        address = self._request.route.denoiser
        with self._timings.of(DENOISER, "denoise").call():
            async with self._calls.open(address, DENOISE_LATENTS) as call:
                await call.write(DenoiseLatentsRequest(spec=self._denoise_spec()).SerializeToString())
                self._denoise_input.open(call)
                async for message in call.messages():
                    await self._accept(message, group)
        finished = sum(latents.finished for latents in self._latents.values())
        if finished != len(self._params.seeds):
            raise StageDisagreement(
                f"{address.stage} at {address.target} made {finished} of {len(self._params.seeds)} images"
            )

    async def _accept(self, message: bytes, group: asyncio.TaskGroup) -> None:
        """Takes one of the denoiser's messages; kinds that are not known here are of no use here."""
        arm = field_number(message)
        if arm in (_LATENTS, _PREVIEW):
            await self._accept_frame(arm, message, group)
        elif arm in (_QUEUED, _STEP, _SUMMARY):
            response = DenoiseLatentsResponse.FromString(message)
            if arm == _SUMMARY:
                self._timings.of(DENOISER, "denoise").report(response.summary)
            else:
                self._step = response.step.step or self._step
                if self._options.tells_progress:
                    await self._emit(_progress(response))
                self._prepare_decoding(response, group)

    async def _accept_frame(self, arm: int, message: bytes, group: asyncio.TaskGroup) -> None:
        parts = indexed_frame_field(message)
        if parts is None or not 0 <= parts[0] < len(self._params.seeds):
            address = self._request.route.denoiser
            raise StageDisagreement(f"{address.stage} at {address.target} sent a frame of no image")
        index, frame = parts
        if arm == _LATENTS:
            await self._relay_latents(index, frame, group)
        elif index == 0:
            await self._relay_preview(frame, group)

    async def _relay_latents(self, index: int, frame: bytes, group: asyncio.TaskGroup) -> None:
        latents = self._latents.get(index) or self._begin_decoding(index, group)
        await latents.put(frame)
        if is_last_frame(frame):
            await latents.finish()

    def _prepare_decoding(self, response: DenoiseLatentsResponse, group: asyncio.TaskGroup) -> None:
        """Opens the decoder's call at the last step: the latents are there in a moment, and the way is too.

        After the caller was told of the step, as one that reads slowly would let the decoder wait too long.
        """
        is_last = response.HasField("step") and response.step.step == self._params.steps
        if is_last and 0 not in self._latents:
            self._begin_decoding(0, group)

    def _begin_decoding(self, index: int, group: asyncio.TaskGroup) -> FrameQueue:
        latents = self._latents[index] = FrameQueue()
        group.create_task(self._decode(index, latents))
        return latents

    async def _decode(self, index: int, latents: FrameQueue) -> None:
        image = await self._decoded(self._decode_spec(index), latents)
        if index == 0 and self._preview is not None:
            # Nobody wants to see how an image looks so far that is finished.
            self._preview.cancel()
            self._preview_latents.abandon()
        await self._emit(self._image_event(index, image))

    async def _relay_preview(self, frame: bytes, group: asyncio.TaskGroup) -> None:
        """Relays a preview; one that begins while the last is still being decoded is dropped."""
        begins = self._preview_latents.finished or self._preview is None
        if begins:
            self._preview_latents = FrameQueue()
            if self._preview is None or self._preview.done():
                self._preview = group.create_task(self._decode_preview(self._preview_latents, self._step))
            else:
                self._preview_latents.abandon()
        await self._preview_latents.put(frame)
        if is_last_frame(frame):
            await self._preview_latents.finish()

    async def _decode_preview(self, latents: FrameQueue, step: int) -> None:
        """Decodes a preview after `step` steps. If that fails, the request goes on: the next one may succeed."""
        spec = DecodeSpec(
            model=self._request.route.vae_decoder.model,
            format=ImageFormat.IMAGE_FORMAT_JPEG,
            quality=_PREVIEW_QUALITY,
        )
        try:
            image = await self._decoded(spec, latents)
        except (ServiceError, StageDisagreement) as error:
            _log.warning("no preview: %s", error)
            latents.abandon()
        else:
            await self._emit(self._image_event(0, image, preview_step=step))

    async def _decoded(self, spec: DecodeSpec, latents: FrameQueue) -> DecodedImage:
        timing = self._timings.of(VAE_DECODER, "decode")
        return await decode_latents(
            self._calls, self._request.route.vae_decoder, spec, latents.frames(), timing
        )

    def _denoise_spec(self) -> DenoiseSpec:
        params = self._params
        return DenoiseSpec(
            model=self._request.route.denoiser.model,
            width_px=params.width_px,
            height_px=params.height_px,
            seeds=params.seeds,
            step_count=params.steps,
            guidance_scale=params.guidance,
            reference_count=params.reference_count,
            priority=self._request.priority,
            preview_interval_steps=self._request.preview_interval_steps,
            adapters=[Adapter(name=adapter.name, scale=adapter.scale) for adapter in params.adapters],
        )

    def _decode_spec(self, index: int) -> DecodeSpec:
        return DecodeSpec(
            model=self._request.route.vae_decoder.model,
            format=self._request.format,
            quality=self._request.quality,
            metadata=self._file_metadata(self._params, index),
        )

    def _file_metadata(self, params: GenerationParams, index: int) -> dict[str, str]:
        metadata = dict(self._request.embedded_prompts)
        if not self._options.image_metadata:
            return metadata
        metadata |= {
            "model": self._request.route.name,
            "seed": str(params.seeds[index]),
            "steps": str(params.steps),
        }
        if params.adapters:
            metadata["adapters"] = ", ".join(f"{each.name}:{each.scale:g}" for each in params.adapters)
        return metadata

    def _image_event(self, index: int, image: DecodedImage, *, preview_step: int | None = None) -> ImageEvent:
        description = GeneratedImage(
            index=index,
            seed=self._params.seeds[index],
            width_px=image.summary.width_px,
            height_px=image.summary.height_px,
            format=image.summary.format,
            step=preview_step or 0,
        )
        return ImageEvent(description, image.chunks, is_preview=preview_step is not None)

    def _summary(self) -> GenerationSummary:
        params, prompt = self._params, self._conditioning.prompt_summary
        sizes = self._conditioning.reference_sizes.values()
        return GenerationSummary(
            request_id=request_id.get(),
            model=self._request.route.name,
            flow=self._request.flow,
            prompt_token_count=prompt.token_count,
            prompt_truncated=prompt.truncated,
            input_megapixels=sum(width_px * height_px for width_px, height_px in sizes) / 1e6,
            output_megapixels=params.width_px * params.height_px * len(params.seeds) / 1e6,
            step_count=params.steps,
            guidance_scale=params.guidance,
            stage_timings=self._timings.messages(),
            total_duration=duration(time.perf_counter() - self._options.arrived_at),
            warnings=self._request.warnings,
        )


def _progress(response: DenoiseLatentsResponse) -> StreamGenerateImageResponse:
    """Tells the caller what the denoiser says of the queue or of a step."""
    if response.HasField("step"):
        step = GenerationStep(step=response.step.step, step_count=response.step.step_count)
        return StreamGenerateImageResponse(step=step)
    queued = GenerationQueued(position=response.queued.position)
    if response.queued.HasField("estimated_wait"):
        queued.estimated_wait.CopyFrom(response.queued.estimated_wait)
    return StreamGenerateImageResponse(queued=queued)
