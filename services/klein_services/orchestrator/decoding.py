"""Decoding of one image: the queue of its latents and the call that returns the image file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from klein_api.v1.vae_decoder_service_pb2 import (
    DecodeLatentsRequest,
    DecodeLatentsResponse,
    DecodeSpec,
    DecodeSummary,
)
from klein_services.orchestrator.masked_edit import MaskedEdit
from klein_services.orchestrator.routing import DENOISER, StageAddress
from klein_services.orchestrator.stage_client import (
    DECODE_LATENTS,
    BidiStream,
    StageClient,
    StageDisagreement,
)
from klein_services.orchestrator.timings import OperationTiming, TransferMetrics
from klein_services.runtime.protowire import FileChunks, chunk_of

_FRAMES_AT_ONCE = 2
"""Frames that wait between a reader and a writer; a full queue stops the reading, which slows the sender down."""
_IMAGE_CHUNKS = FileChunks(DecodeLatentsRequest.INITIAL_IMAGE_CHUNK_FIELD_NUMBER)
_MASK_CHUNKS = FileChunks(DecodeLatentsRequest.MASK_CHUNK_FIELD_NUMBER)
_IMAGE_BYTES_LIMIT = 64 << 20
"""Most bytes of one encoded image; unencoded, 4 megapixels are 12 MiB."""


class FrameQueue:
    """One tensor between a task that reads its frames and a task that writes them; never holds all of it."""

    def __init__(self) -> None:
        self._frames: asyncio.Queue[bytes | None] = asyncio.Queue(_FRAMES_AT_ONCE)
        self._abandoned = False
        self.finished = False
        """Whether the last frame has been put."""

    async def put(self, frame: bytes) -> None:
        """Adds a frame, once there is room for it."""
        if not self._abandoned:
            await self._frames.put(frame)

    async def finish(self) -> None:
        """Ends the tensor."""
        self.finished = True
        await self._frames.put(None)

    def abandon(self) -> None:
        """Drops what waits and what still comes, so that the reader never waits for a writer that has failed."""
        self._abandoned = True
        while not self._frames.empty():
            self._frames.get_nowait()

    async def frames(self) -> AsyncIterator[bytes]:
        """Yields the frames in order until the tensor ends."""
        while (frame := await self._frames.get()) is not None:
            yield frame


@dataclass(frozen=True)
class DecodedImage:
    """An encoded image and the stage's summary of it."""

    summary: DecodeSummary
    chunks: list[memoryview]


async def decode_latents(
    stages: StageClient,
    address: StageAddress,
    spec: DecodeSpec,
    frames: AsyncIterator[bytes],
    timing: OperationTiming,
    pixel_count: int,
    overlay: MaskedEdit | None = None,
) -> DecodedImage:
    """Decodes one image while its latents are still arriving.

    Args:
        stages: opens the call.
        address: the vae-decoder.
        spec: how the image is to be encoded.
        frames: the latents' serialized frames, as `protowire` moves them.
        timing: where the call is counted.
        pixel_count: pixels of the image.
        overlay: the masked edit whose initial image stands outside its mask; `spec` gets its preparation.

    Raises:
        StageDisagreement: the image is not as long as its summary says.
        Exception: as `ServerStream.messages`.
    """
    with timing.call(), stages.backlog.call(address, "decode", pixel_count) as work:
        async with stages.stream_stream(address, DECODE_LATENTS) as call:
            if overlay is not None:
                spec.overlay.CopyFrom(overlay.inpainting)
            await call.write(DecodeLatentsRequest(spec=spec).SerializeToString())
            if overlay is not None:
                for message in overlay.files(_IMAGE_CHUNKS, _MASK_CHUNKS):
                    await call.write(message)
            transfer = TransferMetrics(DENOISER, address.stage)
            async for frame in frames:
                transfer.add(frame)
                await call.write_frame(frame)
            await call.done_writing()
            work.begin()
            transfer.finish()
            image = await _read_image(call)
    work.measured(timing.report(image.summary))
    return image


async def _read_image(call: BidiStream) -> DecodedImage:
    """Reads a summary and the chunks of the image; stops at the first message that does not fit."""
    summary: DecodeSummary | None = None
    chunks: list[memoryview] = []
    missing = 0
    transfer = TransferMetrics(call.address.stage, "orchestrator")
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
            transfer.add(message)
        if not 0 <= missing <= _IMAGE_BYTES_LIMIT:
            break
    if summary is None or missing:
        raise StageDisagreement(
            f"{call.address.stage} at {call.address.target} did not send the image it announced"
        )
    transfer.finish()
    return DecodedImage(summary, chunks)
