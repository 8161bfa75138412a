"""Client of the public API, shared by the commands, the demo and the benchmarks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from klein_api.v1 import image_service_pb2 as api
from klein_api.v1.image_service_pb2_grpc import ImageServiceStub
from klein_services.cli.target import Target
from klein_services.runtime.channels import IMAGE_MESSAGE_BYTES, open_channel

if TYPE_CHECKING:
    from klein_api.v1.image_service_pb2_grpc import ImageServiceAsyncStub


OPERATIONS = ("encode-prompt", "encode-initial-image", "encode-reference", "denoise", "decode")
"""Operations of a request, in the order in which it passes them."""


@dataclass(frozen=True)
class Generation:
    """Result of a finished request."""

    images: tuple[api.GeneratedImage, ...]
    summary: api.GenerationSummary


@asynccontextmanager
async def connect(target: Target | str) -> AsyncIterator[ImageServiceAsyncStub]:
    """Opens a channel to an orchestrator for the duration of the block, in plaintext if only an address is given."""
    called = Target(target) if isinstance(target, str) else target
    async with open_channel(
        called.address,
        message_bytes=IMAGE_MESSAGE_BYTES,
        credentials=called.credentials,
        server_name=called.server_name,
    ) as channel:
        yield ImageServiceStub(channel)


async def generate(
    stub: ImageServiceAsyncStub,
    spec: api.ImageSpec,
    *,
    timeout_seconds: float | None = None,
    on_event: Callable[[api.StreamGenerateImageResponse], None] = lambda event: None,
) -> Generation:
    """Makes the images of `spec` and passes each event to `on_event`.

    Raises:
        grpc.aio.AioRpcError: the call failed.
    """
    images: list[api.GeneratedImage] = []
    summary = api.GenerationSummary()
    call = stub.StreamGenerateImage(api.StreamGenerateImageRequest(spec=spec), timeout=timeout_seconds)
    async for event in call:
        on_event(event)
        match event.WhichOneof("event"):
            case "image":
                images.append(event.image)
            case "summary":
                summary = event.summary
    return Generation(tuple(images), summary)


def timings_in_order(summary: api.GenerationSummary) -> list[api.StageTiming]:
    """Returns the timings in the order of `OPERATIONS`, unknown operations last."""
    position = {operation: index for index, operation in enumerate(OPERATIONS)}
    return sorted(summary.stage_timings, key=lambda timing: position.get(timing.operation, len(position)))
