"""The vae-decoder as a server's application: loading the model, and the service around it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import grpc
import torch

from klein_api.v1 import stage_service_pb2, vae_decoder_service_pb2_grpc
from klein_api.v1 import vae_decoder_service_pb2 as pb
from klein_core.checkpoint.key_mapping import VAE
from klein_core.checkpoint.weights import weights_digest
from klein_core.params import SIZE_MULTIPLE_PX, Limits
from klein_core.vae_decoder.decoder import VaeDecoder, image_tensor
from klein_core.vae_decoder.image_io import ReferenceLimits, encode_image, prepare_reference
from klein_core.vae_decoder.tiling import TilingPolicy
from klein_services.runtime.admission import ConcurrencyLimit, receive
from klein_services.runtime.errors import StageUnavailable
from klein_services.runtime.frames import MAX_FRAME_BYTES
from klein_services.runtime.stage import Loaded, ModelService, deadline_of, duration
from klein_services.runtime.tensors import (
    dtype_name,
    host_tensor,
    report_memory,
    resolve_device,
    resolve_dtype,
    set_threads,
    tensor_frames,
)
from klein_services.runtime.worker import Completed, Worker
from klein_services.vae_decoder.requests import DecodeRequest, Encoding, ReferenceRequest
from klein_services.vae_decoder.settings import VaeDecoderSettings

ENCODE_REFERENCE = "encode-reference"
DECODE = "decode"
READ_REFERENCE = "read-reference"
WRITE_IMAGE = "write-image"


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Two threads, so that the device does not wait for the CPU to compress a picture."""

    device: Worker
    """Runs the autoencoder."""
    files: Worker
    """Reads and writes image files."""


class VaeDecoderServicer(vae_decoder_service_pb2_grpc.VaeDecoderServiceServicer):
    """Implements VaeDecoderService.

    Args:
        workers: compute.
        places: bounds the requests that hold memory.
        settings: model name and limits.
        decoder: returns the loaded model.
    """

    def __init__(
        self,
        workers: Workers,
        places: ConcurrencyLimit,
        settings: VaeDecoderSettings,
        decoder: Callable[[], VaeDecoder],
    ) -> None:
        self._workers = workers
        self._places = places
        self._settings = settings
        self._limits = Limits(pixel_count=settings.maximum_pixel_count)
        self._decoder = decoder

    async def EncodeReference(
        self,
        request_iterator: AsyncIterator[pb.EncodeReferenceRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.EncodeReferenceResponse]:
        with ExitStack() as held:
            request = ReferenceRequest(
                self._settings.model_name, self._settings.reference_bytes, self._admission(held)
            )
            await self._receive(request_iterator, request)
            deadline = deadline_of(context)
            read = await self._workers.files.run(
                lambda: self._read(request), operation=READ_REFERENCE, deadline=deadline
            )
            encoded = await self._workers.device.run(
                lambda: self._encode(read.value), operation=ENCODE_REFERENCE, deadline=deadline
            )
            yield pb.EncodeReferenceResponse(summary=_reference_summary(read, encoded))
            for frame in tensor_frames(encoded.value):
                yield pb.EncodeReferenceResponse(reference_latents=frame)

    async def DecodeLatents(
        self,
        request_iterator: AsyncIterator[pb.DecodeLatentsRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.DecodeLatentsResponse]:
        channels = self._decoder().config.packed_channels
        with ExitStack() as held:
            request = DecodeRequest(self._settings.model_name, channels, self._limits, self._admission(held))
            await self._receive(request_iterator, request)
            encoding, deadline = request.encoding, deadline_of(context)
            decoded = await self._workers.device.run(
                lambda: self._decoder().decode(request.latents()), operation=DECODE, deadline=deadline
            )
            written = await self._workers.files.run(
                lambda: encode_image(decoded.value, encoding.name, encoding.quality, encoding.metadata),
                operation=WRITE_IMAGE,
                deadline=deadline,
            )
            yield pb.DecodeLatentsResponse(summary=_decode_summary(decoded, written, encoding))
            view = memoryview(written.value)
            for start in range(0, len(view), MAX_FRAME_BYTES):
                yield pb.DecodeLatentsResponse(image_chunk=bytes(view[start : start + MAX_FRAME_BYTES]))

    def _admission(self, held: ExitStack) -> Callable[[], None]:
        """Returns what takes a place and leaves it to `held`; called while receiving, which refuses in order."""
        return lambda: held.enter_context(self._places.one())

    async def _receive(self, messages: AsyncIterator[Any], request: ReferenceRequest | DecodeRequest) -> None:
        """Receives a whole request within the time that there is for it."""
        await receive(messages, request.accept, timeout_seconds=self._settings.receive_timeout_seconds)
        request.require_finished()

    def _read(self, request: ReferenceRequest) -> torch.Tensor:
        limits = self._decoder().reference_limits
        return image_tensor(prepare_reference(request.file(), field=request.field, limits=limits))

    def _encode(self, image: torch.Tensor) -> torch.Tensor:
        return host_tensor(self._decoder().encode(image))


def _reference_summary(
    read: Completed[torch.Tensor], encoded: Completed[torch.Tensor]
) -> pb.ReferenceSummary:
    height_px, width_px, _ = read.value.shape
    return pb.ReferenceSummary(
        width_px=width_px,
        height_px=height_px,
        queue_duration=duration(read.queue_seconds + encoded.queue_seconds),
        compute_duration=duration(read.compute_seconds + encoded.compute_seconds),
    )


def _decode_summary(
    decoded: Completed[torch.Tensor], written: Completed[bytes], encoding: Encoding
) -> pb.DecodeSummary:
    height_px, width_px, _ = decoded.value.shape
    return pb.DecodeSummary(
        width_px=width_px,
        height_px=height_px,
        format=encoding.number,
        size_bytes=len(written.value),
        queue_duration=duration(decoded.queue_seconds + written.queue_seconds),
        compute_duration=duration(decoded.compute_seconds + written.compute_seconds),
    )


class VaeDecoderApplication(ModelService):
    """One autoencoder behind one worker."""

    name = "vae-decoder"
    service_names = ("klein_api.v1.VaeDecoderService",)
    operations = (ENCODE_REFERENCE, DECODE)

    def __init__(self, settings: VaeDecoderSettings) -> None:
        super().__init__(settings)
        self._settings = settings
        # Requests that are received, computed or answered; each may hold a file or an image.
        self.places = ConcurrencyLimit(2 * settings.queue_limit)
        # What has been decoded must not be refused for want of a place, so this queue has one for all of them.
        self._files = Worker(f"{self.name}-files", self.places.limit)
        self._decoder: VaeDecoder | None = None

    @property
    def decoder(self) -> VaeDecoder:
        """The loaded model.

        Raises:
            StageUnavailable: it is not loaded yet.
        """
        if self._decoder is None:
            raise StageUnavailable("the model is not loaded")
        return self._decoder

    def register(self, server: grpc.aio.Server) -> None:
        super().register(server)
        workers = Workers(device=self.worker, files=self._files)
        servicer = VaeDecoderServicer(workers, self.places, self._settings, lambda: self.decoder)
        vae_decoder_service_pb2_grpc.add_VaeDecoderServiceServicer_to_server(servicer, server)

    def load_model(self) -> Loaded:
        set_threads(self._settings.threads)
        device = resolve_device(self._settings.device)
        report_memory(self.name, device)
        decoder = VaeDecoder.from_folder(
            self._settings.model_files(VAE),
            device,
            resolve_dtype(self._settings.dtype),
            ReferenceLimits(byte_count=self._settings.reference_bytes),
            TilingPolicy(self._settings.tiling, (self._settings.tiling_limit_mib << 20) or None),
        )
        _warm_up(decoder, self._settings.warm_up_size_px)
        self._decoder = decoder
        facts = stage_service_pb2.VaeDecoderFacts(latent_channels=decoder.config.packed_channels)
        return Loaded(
            device=str(device),
            dtype=dtype_name(decoder.dtype),
            weights_digest=weights_digest(decoder.autoencoder),
            facts=facts,
        )

    async def close(self) -> None:
        await super().close()
        self._files.close()


def _warm_up(decoder: VaeDecoder, size_px: int) -> None:
    side_px = size_px - size_px % SIZE_MULTIPLE_PX
    decoder.decode(decoder.encode(torch.zeros(side_px, side_px, 3)))
