"""Delivery of a request's images: decoding, checks and signature, and the events for the client."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from klein_api.v1.image_pb2 import ImageFormat
from klein_api.v1.image_service_pb2 import GeneratedImage
from klein_api.v1.vae_decoder_service_pb2 import DecodeSpec
from klein_core.image_format import DIGITAL_SOURCE_TYPE
from klein_services.orchestrator.decoding import DecodedImage, FrameQueue, decode_latents
from klein_services.orchestrator.events import EventQueue, ImageEvent
from klein_services.orchestrator.manifest_signer import SigningFailed
from klein_services.orchestrator.masked_edit import MaskedEdit
from klein_services.orchestrator.progress import GenerationOptions, Progress
from klein_services.orchestrator.provenance import digital_source_type
from klein_services.orchestrator.request import ImageRequest
from klein_services.orchestrator.routing import VAE_DECODER
from klein_services.orchestrator.stage_client import StageClient, StageDisagreement
from klein_services.runtime.errors import ServiceError

_PREVIEW_QUALITY = 85
_log = logging.getLogger("klein.orchestrator")


class ImageDelivery:
    """Turns latents that arrive into images that the client gets.

    Args:
        request: the validated request.
        progress: notes which images the client has got.
        stages: makes the stage calls.
        events: takes each event for the client, once there is room for it.
        options: contents of the files, and the checks that images pass.
    """

    def __init__(
        self,
        request: ImageRequest,
        progress: Progress,
        stages: StageClient,
        events: EventQueue,
        options: GenerationOptions,
    ) -> None:
        self._request = request
        self._progress = progress
        self._stages = stages
        self._events = events
        self._options = options
        self.preview: asyncio.Task[None] | None = None
        """The preview that is being decoded, or the last one."""
        self.preview_latents = FrameQueue()

    async def deliver_image(self, index: int, latents: FrameQueue) -> None:
        """Decodes a final image, has it checked and signed, and makes it an event."""
        progress, edit = self._progress, self._request.masked_edit
        spec = DecodeSpec(
            model=self._request.route.vae_decoder.model,
            format=self._request.format,
            quality=self._request.quality,
            metadata=self._metadata(index),
            priority=self._request.priority,
        )
        image = await self._decode(spec, latents, edit if edit is not None and edit.has_overlay else None)
        description = self._description(index, image)
        chunks = await self._released(description, image)
        if index == 0 and self.preview is not None:
            # A preview of a finished image is of no use.
            self.preview.cancel()
            self.preview_latents.abandon()
        await self._events.put(ImageEvent(description, chunks))
        # Without a pause after the event, so that no later attempt makes the image once more.
        progress.delivered.add(index)
        progress.saved.delivered(index)
        progress.marks += 1
        progress.output_pixel_count += image.summary.width_px * image.summary.height_px

    async def deliver_preview(self, latents: FrameQueue, step: int) -> None:
        """Decodes the preview after `step` steps. A failure is only logged, because the next one may succeed."""
        spec = DecodeSpec(
            model=self._request.route.vae_decoder.model,
            format=ImageFormat.IMAGE_FORMAT_JPEG,
            quality=_PREVIEW_QUALITY,
            priority=self._request.priority,
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

    def _metadata(self, index: int) -> dict[str, str]:
        """Returns what is stored in an image's file."""
        params, edit = self._progress.params, self._request.masked_edit
        metadata = dict(self._request.embedded_prompts)
        if self._options.image_metadata:
            metadata["model"] = self._request.route.name
            metadata[DIGITAL_SOURCE_TYPE] = digital_source_type(self._request)
            metadata["seed"], metadata["steps"] = str(params.seeds[index]), str(params.steps)
            if edit is not None:
                metadata["strength"] = f"{edit.strength:g}"
            if params.adapters:
                metadata["adapters"] = ", ".join(f"{each.name}:{each.scale:g}" for each in params.adapters)
        return metadata

    async def _decode(
        self, spec: DecodeSpec, latents: FrameQueue, overlay: MaskedEdit | None = None
    ) -> DecodedImage:
        params, timing = self._progress.params, self._progress.timings.of(VAE_DECODER, "decode")
        pixel_count = params.width_px * params.height_px
        address = self._request.route.vae_decoder
        return await decode_latents(
            self._stages, address, spec, latents.frames(), timing, pixel_count, overlay
        )

    async def _released(self, description: GeneratedImage, image: DecodedImage) -> Sequence[memoryview]:
        return await self._options.release.released(
            self._request, description, self._progress.params.steps, image.chunks, self._stages.deadline
        )

    def _description(self, index: int, image: DecodedImage) -> GeneratedImage:
        return GeneratedImage(
            index=index,
            seed=self._progress.params.seeds[index],
            width_px=image.summary.width_px,
            height_px=image.summary.height_px,
            format=image.summary.format,
        )
