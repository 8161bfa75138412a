"""Reference images to latents, and latents to images."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import grpc
import torch
from klein_api.v1 import vae_decoder_service_pb2 as pb
from klein_api.v1 import vae_decoder_service_pb2_grpc

from klein_core.params import Limits
from klein_core.vae_decoder.image import encode_image
from klein_core.vae_decoder.stage import EncodedReference, VaeDecoder
from services.runtime.frames import MAX_FRAME_BYTES
from services.runtime.receive import receive
from services.runtime.stage_application import deadline_of
from services.runtime.stages import duration
from services.runtime.tensors import host_tensor, tensor_frames
from services.runtime.worker import Completed, Worker
from services.vae_decoder.requests import DecodeRequest, Encoding, ReferenceRequest, require_finite
from services.vae_decoder.settings import VaeDecoderSettings

ENCODE_REFERENCE = "encode-reference"
DECODE = "decode"


@dataclass(frozen=True)
class _Image:
    data: bytes
    width_px: int
    height_px: int


class VaeDecoderServicer(vae_decoder_service_pb2_grpc.VaeDecoderServiceServicer):
    """Implements VaeDecoderService.

    Args:
        worker: computes.
        settings: model name and limits.
        decoder: returns the loaded model.
    """

    def __init__(
        self, worker: Worker, settings: VaeDecoderSettings, decoder: Callable[[], VaeDecoder]
    ) -> None:
        self._worker = worker
        self._settings = settings
        self._limits = Limits(pixel_count=settings.maximum_pixel_count)
        self._decoder = decoder

    async def EncodeReference(
        self,
        request_iterator: AsyncIterator[pb.EncodeReferenceRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.EncodeReferenceResponse]:
        request = ReferenceRequest(self._settings.model_name, self._settings.reference_bytes)
        timeout = self._settings.receive_timeout_seconds
        await receive(request_iterator, request.accept, timeout_seconds=timeout)
        data = request.finish()
        completed = await self._worker.run(
            lambda: self._encode(data, request.field),
            operation=ENCODE_REFERENCE,
            deadline=deadline_of(context),
        )
        yield pb.EncodeReferenceResponse(summary=_reference_summary(completed))
        for frame in tensor_frames(completed.value.latents):
            yield pb.EncodeReferenceResponse(reference_latents=frame)

    async def DecodeLatents(
        self,
        request_iterator: AsyncIterator[pb.DecodeLatentsRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.DecodeLatentsResponse]:
        channels = self._decoder().config.packed_channels
        request = DecodeRequest(self._settings.model_name, channels, self._limits)
        timeout = self._settings.receive_timeout_seconds
        await receive(request_iterator, request.accept, timeout_seconds=timeout)
        latents, encoding = request.finish(), request.encoding
        completed = await self._worker.run(
            lambda: self._decode(latents, encoding), operation=DECODE, deadline=deadline_of(context)
        )
        yield pb.DecodeLatentsResponse(summary=_decode_summary(completed, encoding))
        view = memoryview(completed.value.data)
        for start in range(0, len(view), MAX_FRAME_BYTES):
            yield pb.DecodeLatentsResponse(image_chunk=bytes(view[start : start + MAX_FRAME_BYTES]))

    def _encode(self, data: bytes, field: str) -> EncodedReference:
        encoded = self._decoder().encode_reference(data, field)
        return replace(encoded, latents=host_tensor(encoded.latents))

    def _decode(self, latents: torch.Tensor, encoding: Encoding) -> _Image:
        require_finite(latents)
        pixels = self._decoder().decode(latents)
        height_px, width_px, _ = pixels.shape
        data = encode_image(pixels, encoding.name, encoding.quality, encoding.metadata)
        return _Image(data, width_px, height_px)


def _reference_summary(completed: Completed[EncodedReference]) -> pb.ReferenceSummary:
    return pb.ReferenceSummary(
        width_px=completed.value.width_px,
        height_px=completed.value.height_px,
        queue_duration=duration(completed.queue_seconds),
        compute_duration=duration(completed.compute_seconds),
    )


def _decode_summary(completed: Completed[_Image], encoding: Encoding) -> pb.DecodeSummary:
    return pb.DecodeSummary(
        width_px=completed.value.width_px,
        height_px=completed.value.height_px,
        format=encoding.number,
        size_bytes=len(completed.value.data),
        queue_duration=duration(completed.queue_seconds),
        compute_duration=duration(completed.compute_seconds),
    )
