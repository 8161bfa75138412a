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

_IMAGE_BYTES_LIMIT = 64 << 20
"""Most bytes of one encoded image; unencoded, 4 megapixels are 12 MiB."""


@dataclass(frozen=True)
class DecodedImage:
    """An encoded image and what the stage says of it."""

    summary: DecodeSummary
    data: bytes


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
    chunks: list[bytes] = []
    missing = 0
    hop = Hop(call.address.stage, "orchestrator")
    async for message in call.messages():
        response = DecodeLatentsResponse.FromString(message)
        if summary is None:
            summary, missing = response.summary, response.summary.size_bytes
        else:
            chunks.append(response.image_chunk)
            missing -= len(chunks[-1])
            hop.add(message)
        if missing < 0 or missing > _IMAGE_BYTES_LIMIT:
            break
    if summary is None or missing:
        raise StageDisagreement(
            f"{call.address.stage} at {call.address.target} did not send the image it announced"
        )
    hop.finish()
    return DecodedImage(summary, b"".join(chunks))
