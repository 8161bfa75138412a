"""Reference images to latents, and latents to images."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import grpc
import torch

from klein_api.v1 import vae_decoder_service_pb2 as pb
from klein_api.v1 import vae_decoder_service_pb2_grpc
from klein_core.params import Limits
from klein_core.vae_decoder.image import encode_image
from klein_core.vae_decoder.references import prepare_reference
from klein_core.vae_decoder.stage import VaeDecoder, image_tensor
from services.runtime.frames import MAX_FRAME_BYTES
from services.runtime.places import Places
from services.runtime.receive import receive
from services.runtime.stage_application import deadline_of
from services.runtime.stages import duration
from services.runtime.tensors import host_tensor, tensor_frames
from services.runtime.worker import Completed, Worker
from services.vae_decoder.requests import DecodeRequest, Encoding, ReferenceRequest
from services.vae_decoder.settings import VaeDecoderSettings

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
        places: Places,
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
