"""Latents relayed into a vae-decoder, and the image that comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from klein_api.v1.vae_decoder_service_pb2 import (
    DecodeLatentsRequest,
    DecodeLatentsResponse,
    DecodeSpec,
    DecodeSummary,
)
from services.orchestrator.calls import DECODE_LATENTS, StageCall, StageCalls
from services.orchestrator.failures import StageDisagreement
from services.orchestrator.relay import Hop
from services.orchestrator.routing import DENOISER, StageAddress
from services.orchestrator.timings import OperationTiming
from services.orchestrator.wire import chunk_of

_IMAGE_BYTES_LIMIT = 64 << 20
"""Most bytes of one encoded image; unencoded, 4 megapixels are 12 MiB."""


@dataclass(frozen=True)
class DecodedImage:
    """An encoded image and what the stage says of it."""

    summary: DecodeSummary
    chunks: list[memoryview]


async def decode_latents(
    calls: StageCalls,
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


async def _received(call: StageCall) -> DecodedImage:
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
