"""The vae-decoder: its gRPC service and the stage that loads its model."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import torch
from google.protobuf.duration_pb2 import Duration

from klein_api.v1 import stage_service_pb2, vae_decoder_service_pb2_grpc
from klein_api.v1 import vae_decoder_service_pb2 as pb
from klein_core.checkpoint.key_mapping import VAE
from klein_core.checkpoint.weights import weights_digest
from klein_core.params import SIZE_MULTIPLE_PX, Limits
from klein_core.vae_decoder.decoder import VaeDecoder, rgb_tensor, scaled_pixels
from klein_core.vae_decoder.image_io import (
    MODEL_PIXEL_COUNT,
    ReferenceLimits,
    encode_image,
    prepare_reference,
)
from klein_core.vae_decoder.initial_image import InitialImage
from klein_core.vae_decoder.tiling import TilingPolicy
from klein_services.runtime.admission import ConcurrencyLimit
from klein_services.runtime.batching import BatchLimits, batch_limits
from klein_services.runtime.frames import MAX_FRAME_BYTES, FrameReader
from klein_services.runtime.load_phases import READ_WEIGHTS, WARM_UP, phase
from klein_services.runtime.request_parts import read_parts
from klein_services.runtime.settings import SettingsError
from klein_services.runtime.stage import Loaded, ModelService, deadline_of, duration, require_model
from klein_services.runtime.tensors import (
    dtype_name,
    host_tensor,
    report_memory,
    resolve_device,
    resolve_dtype,
    set_threads,
    tensor_frames,
)
from klein_services.runtime.urgency import Urgency, urgency_of
from klein_services.runtime.watchdog import watched
from klein_services.runtime.work_queue import LARGE_PIXEL_COUNT
from klein_services.runtime.worker import Completed, Worker
from klein_services.vae_decoder.held_bytes import ENCODING_SHARE, PIXEL_BYTES, HeldBytes, RequestBytes
from klein_services.vae_decoder.request import (
    Encoding,
    image_encoding,
    latents_tensor,
    overlay_image,
    read_file,
    read_initial_image,
    read_latents,
    reference_field,
)
from klein_services.vae_decoder.settings import VaeDecoderSettings
from klein_services.vae_decoder.uploads import FileReader, InitialImageFiles, Preparation
from klein_services.vae_decoder.watermark import Watermark, WatermarkFailed

_log = logging.getLogger("klein.vae_decoder")

ENCODE_REFERENCE = "encode-reference"
ENCODE_INITIAL_IMAGE = "encode-initial-image"
DECODE = "decode"
READ_REFERENCE = "read-reference"
READ_INITIAL_IMAGE = "read-initial-image"
WRITE_IMAGE = "write-image"
OPEN_FILES = "open-files"
MEASURED_PIXEL_COUNTS = (256**2, 512**2)
"""Sizes of images at which it is measured whether batches pay."""


class VaeDecoderServicer(vae_decoder_service_pb2_grpc.VaeDecoderServiceServicer):
    """Implements VaeDecoderService; called only while the stage serves, so its model is loaded."""

    def __init__(self, stage: VaeDecoderStage) -> None:
        self._stage = stage

    async def EncodeReference(
        self,
        request_iterator: AsyncIterator[pb.EncodeReferenceRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.EncodeReferenceResponse]:
        stage, settings, deadline = self._stage, self._stage.settings, deadline_of(context)
        async with read_parts(request_iterator, timeout_seconds=settings.receive_timeout_seconds) as parts:
            spec = (await parts.spec_part()).spec
            field, urgency = reference_field(spec, settings.model_name), urgency_of(spec.priority)
            with stage.slots.slot(), stage.held_bytes.request(ENCODING_SHARE) as held:
                file = await read_file(parts, field, settings.reference_bytes, held)
                opened = await stage.open_files(file, deadline, urgency, held)
                read = await stage.files.run(
                    lambda: stage.read_reference(file.data, field),
                    operation=READ_REFERENCE,
                    deadline=deadline,
                    urgency=urgency,
                    pixel_count=opened.value,
                )
                file.release()
                encoded = await stage.worker.run(
                    lambda: stage.encode(read.value),
                    operation=ENCODE_REFERENCE,
                    deadline=deadline,
                    urgency=urgency,
                    pixel_count=image_pixel_count(read.value),
                )
                height_px, width_px, _ = read.value.shape
                summary = pb.ReferenceSummary(
                    width_px=width_px, height_px=height_px, **_durations(opened, read, encoded)
                )
                yield pb.EncodeReferenceResponse(summary=summary)
                for frame in tensor_frames(encoded.value):
                    yield pb.EncodeReferenceResponse(reference_latents=frame)

    async def EncodeInitialImage(
        self,
        request_iterator: AsyncIterator[pb.EncodeInitialImageRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.EncodeInitialImageResponse]:
        stage, settings, deadline = self._stage, self._stage.settings, deadline_of(context)
        async with read_parts(request_iterator, timeout_seconds=settings.receive_timeout_seconds) as parts:
            spec = (await parts.spec_part()).spec
            require_model(spec.model, settings.model_name)
            preparation, urgency = Preparation.from_spec(spec.inpainting), urgency_of(spec.priority)
            with stage.slots.slot(), stage.held_bytes.request(ENCODING_SHARE) as held:
                files = await read_initial_image(parts, preparation, settings.reference_bytes, held)
                opened = await stage.open_files(files, deadline, urgency, held)
                read = await stage.files.run(
                    lambda: stage.read_initial_image(files),
                    operation=READ_INITIAL_IMAGE,
                    deadline=deadline,
                    urgency=urgency,
                    pixel_count=opened.value,
                )
                files.release()
                pixels, mask = read.value
                encoded = await stage.worker.run(
                    lambda: stage.encode(pixels),
                    operation=ENCODE_INITIAL_IMAGE,
                    deadline=deadline,
                    urgency=urgency,
                    pixel_count=image_pixel_count(pixels),
                )
                height_px, width_px, _ = pixels.shape
                summary = pb.ReferenceSummary(
                    width_px=width_px, height_px=height_px, **_durations(opened, read, encoded)
                )
                yield pb.EncodeInitialImageResponse(summary=summary)
                for frame in tensor_frames(encoded.value):
                    yield pb.EncodeInitialImageResponse(initial_latents=frame)
                for frame in tensor_frames(mask):
                    yield pb.EncodeInitialImageResponse(mask=frame)

    async def DecodeLatents(
        self,
        request_iterator: AsyncIterator[pb.DecodeLatentsRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.DecodeLatentsResponse]:
        stage, settings, deadline = self._stage, self._stage.settings, deadline_of(context)
        channels = stage.decoder.config.packed_channels
        async with read_parts(request_iterator, timeout_seconds=settings.receive_timeout_seconds) as parts:
            spec = (await parts.spec_part()).spec
            encoding, urgency = image_encoding(spec, settings.model_name), urgency_of(spec.priority)
            preparation = Preparation.from_spec(spec.overlay) if spec.HasField("overlay") else None
            with stage.slots.slot(), stage.held_bytes.request() as held:
                overlay = None
                if preparation is not None:
                    overlay = InitialImageFiles(preparation, settings.reference_bytes, held)
                frames = await read_latents(parts, encoding, channels, stage.limits, overlay)
                rows, columns, _ = frames.spec.shape
                pixel_count = rows * columns * SIZE_MULTIPLE_PX**2
                done: list[Completed[Any]] = []
                image: InitialImage | None = None
                if overlay is not None:
                    opened = await stage.open_files(overlay, deadline, urgency, held)
                    read = await stage.files.run(
                        lambda: overlay_image(overlay, stage.decoder.reference_limits, frames),
                        operation=READ_INITIAL_IMAGE,
                        deadline=deadline,
                        urgency=urgency,
                        pixel_count=opened.value,
                    )
                    overlay.release()
                    image = read.value
                    done += [opened, read]
                decoded = await stage.worker.run_together(
                    stage.decode,
                    frames,
                    stage.batches.batch((frames.spec.shape, frames.spec.data_type), pixel_count),
                    operation=DECODE,
                    deadline=deadline,
                    urgency=urgency,
                    pixel_count=pixel_count,
                )
                written = await stage.files.run(
                    lambda: write_image(decoded.value, encoding, image, stage.watermark),
                    operation=WRITE_IMAGE,
                    deadline=deadline,
                    urgency=urgency,
                    # As one that is not large: an image that has been decoded must not be refused for its pixels.
                    pixel_count=min(pixel_count, LARGE_PIXEL_COUNT),
                )
                data, (height_px, width_px, _) = written.value
                summary = pb.DecodeSummary(
                    width_px=width_px,
                    height_px=height_px,
                    format=encoding.number,
                    size_bytes=len(data),
                    **_durations(*done, decoded, written),
                )
                yield pb.DecodeLatentsResponse(summary=summary)
                view = memoryview(data)
                for start in range(0, len(view), MAX_FRAME_BYTES):
                    yield pb.DecodeLatentsResponse(image_chunk=bytes(view[start : start + MAX_FRAME_BYTES]))


def write_image(
    made: torch.Tensor, encoding: Encoding, image: InitialImage | None, watermark: Watermark | None
) -> tuple[bytes, torch.Size]:
    """Lays a decoded image into the initial image, if there is one, marks and encodes it.

    Returns:
        The file and the shape of its pixels.

    Raises:
        WatermarkFailed: the image cannot be marked.
    """
    pixels = made if image is None else image.laid_over(made)
    if watermark is not None:
        pixels = watermark.applied(pixels)
    return encode_image(pixels, encoding.name, encoding.quality, encoding.metadata), pixels.shape


def square_latents(pixel_count: int, channels: int) -> torch.Tensor:
    """Returns random latents of a square image of so many pixels."""
    side = math.isqrt(pixel_count) // SIZE_MULTIPLE_PX
    return torch.randn(side, side, channels)


def image_pixel_count(pixels: torch.Tensor) -> int:
    """Returns the pixels of an image of shape (height, width, channels)."""
    height_px, width_px, _ = pixels.shape
    return height_px * width_px


def _durations(*completed: Completed[Any]) -> dict[str, Duration]:
    """Returns the duration fields of a summary: the sums over a request's operations."""
    return {
        "queue_duration": duration(sum(each.queue_seconds for each in completed)),
        "compute_duration": duration(sum(each.compute_seconds for each in completed)),
    }


class VaeDecoderStage(ModelService):
    """The stage: one autoencoder behind one worker, and threads for image files."""

    name = "vae-decoder"
    service_names = ("klein_api.v1.VaeDecoderService",)
    operations = (ENCODE_REFERENCE, ENCODE_INITIAL_IMAGE, DECODE)

    def __init__(self, settings: VaeDecoderSettings) -> None:
        super().__init__(settings)
        self.settings = settings
        self.limits = Limits(pixel_count=settings.maximum_pixel_count)
        self.slots = ConcurrencyLimit(2 * settings.queue_limit, self.name)
        """Requests that are received, computed or answered; each may hold a file or an image."""
        # Not the device's worker, which must not wait while the CPU compresses an image. One place in the
        # queue for every slot: an image that has been decoded must not be refused here.
        self.files = Worker(
            f"{self.name}-files",
            self.slots.limit,
            (OPEN_FILES, READ_REFERENCE, READ_INITIAL_IMAGE, WRITE_IMAGE),
            thread_count=settings.file_threads,
            pixel_limit=settings.queue_pixel_count,
        )
        """Reads and writes image files."""
        self.held_bytes = HeldBytes(settings.queue_bytes, self.name)
        """Bounds what requests hold in memory while they wait."""
        self.watermark = Watermark(settings.watermark) if settings.watermark else None
        """Marks every image; `None` when none is set."""
        self.batches = BatchLimits()
        """Images that are decoded together; set by `load_model`."""
        self.decoder: VaeDecoder
        """The model; set by `load_model`."""

    def register(self, server: grpc.aio.Server) -> None:
        super().register(server)
        vae_decoder_service_pb2_grpc.add_VaeDecoderServiceServicer_to_server(VaeDecoderServicer(self), server)

    async def open_files(
        self,
        files: FileReader | InitialImageFiles,
        deadline: float | None,
        urgency: Urgency,
        held: RequestBytes,
    ) -> Completed[int]:
        """Returns the pixels that files announce, by which the reading of their pixels is scheduled.

        Takes the bytes of the pixels that will wait for the device.

        Raises:
            InvalidInput: a file is not an image, or exceeds the limits.
            QueueFull: requests hold too many bytes.
        """
        opened = await self.files.run(
            lambda: files.pixel_count(self.decoder.reference_limits),
            operation=OPEN_FILES,
            deadline=deadline,
            urgency=urgency,
        )
        held.add(PIXEL_BYTES * min(opened.value, MODEL_PIXEL_COUNT))
        return opened

    def read_reference(self, data: bytes, field: str) -> torch.Tensor:
        """Returns the pixels of a reference's file: uint8, (height, width, 3); `field` names it in errors."""
        return rgb_tensor(prepare_reference(data, field=field, limits=self.decoder.reference_limits))

    def read_initial_image(self, files: InitialImageFiles) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns an initial image's pixels, uint8 (height, width, 3), and its mask: (rows, columns, 1)."""
        image = files.prepare(self.decoder.reference_limits)
        return rgb_tensor(image.pixels()), image.token_mask()

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns the latents of an image's uint8 pixels, on the CPU."""
        with watched("encode", pixels.numel()):
            return host_tensor(self.decoder.encode(scaled_pixels(pixels)))

    def decode(self, received: Sequence[FrameReader]) -> list[torch.Tensor]:
        """Returns the pixels of each of some latents of one shape."""
        latents = [latents_tensor(frames) for frames in received]
        with watched(DECODE, sum(each.numel() for each in latents)):
            return self.decoder.decode_batch(latents)

    def load_model(self) -> Loaded:
        set_threads(self.settings.threads)
        device = resolve_device(self.settings.device)
        report_memory(self.name, device)
        with phase(READ_WEIGHTS):
            decoder = VaeDecoder.from_folder(
                self.settings.model_files(VAE),
                device,
                decoder_dtype(self.settings.dtype, device),
                ReferenceLimits(byte_count=self.settings.reference_bytes),
                TilingPolicy(self.settings.tiling, (self.settings.tiling_limit_mib << 20) or None),
            )
        _log.info("%s", decoder.tiling)
        channels = decoder.config.packed_channels
        with phase(WARM_UP):
            for side_px in self.settings.warm_up_sizes_px(on_gpu=device.type == "cuda"):
                # Random: products of zeros are faster than those of images.
                pixels = decoder.decode(decoder.encode(2 * torch.rand(side_px, side_px, 3) - 1))
            self.batches = batch_limits(
                self.settings,
                device.type,
                lambda count, pixel_count: decoder.decode_batch(
                    [square_latents(pixel_count, channels)] * count
                ),
                MEASURED_PIXEL_COUNTS,
            )
        if self.watermark is not None:
            try:
                self.watermark.applied(pixels)
            except WatermarkFailed as error:
                cause = f": {error.__cause__}" if error.__cause__ else ""
                raise SettingsError(f"KLEIN_WATERMARK: {error}{cause}") from error
        self.decoder = decoder
        facts = stage_service_pb2.VaeDecoderFacts(latent_channels=channels, watermark=self.settings.watermark)
        return Loaded(
            device=str(device),
            dtype=dtype_name(decoder.dtype),
            weights_digest=weights_digest(decoder.autoencoder),
            facts=facts,
        )

    async def close(self) -> None:
        await super().close()
        self.files.close()


def decoder_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """Returns the dtype of a VAE of a `dtype` setting.

    Published files in fp32 are for any device; on CUDA bfloat16 takes half their memory and about half their time.
    """
    return torch.bfloat16 if name == "auto" and device.type == "cuda" else resolve_dtype(name)
