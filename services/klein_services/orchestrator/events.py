"""Events of a request for its client, and the queue that carries them to the handler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from klein_api.v1.image_service_pb2 import (
    GeneratedImage,
    GenerateImageResponse,
    GenerationSummary,
    StreamGenerateImageResponse,
)
from klein_services.runtime.protowire import enclosed

_EVENTS_AT_ONCE = 4


@dataclass(frozen=True)
class ImageEvent:
    """A finished image or a preview, its bytes as they came from the stage.

    Not a protobuf message: putting megabytes into one and out again copies them four times.
    """

    description: GeneratedImage
    """Everything but `data`."""
    chunks: Sequence[memoryview]
    """The file, in order."""
    is_preview: bool = False

    @property
    def parts(self) -> list[bytes | memoryview]:
        """The serialized `GeneratedImage`, to be joined."""
        data = enclosed(GeneratedImage.DATA_FIELD_NUMBER, self.chunks)
        return [self.description.SerializeToString(), *data]

    def streamed(self) -> bytes:
        """Returns it as a serialized `StreamGenerateImageResponse`."""
        kind = StreamGenerateImageResponse
        return b"".join(
            enclosed(kind.PREVIEW_FIELD_NUMBER if self.is_preview else kind.IMAGE_FIELD_NUMBER, self.parts)
        )


Event = StreamGenerateImageResponse | ImageEvent


def collected(images: Sequence[ImageEvent], summary: GenerationSummary) -> bytes:
    """Returns a serialized `GenerateImageResponse`, its images in order of seeds."""
    parts: list[bytes | memoryview] = []
    for image in sorted(images, key=lambda image: image.description.index):
        parts += enclosed(GenerateImageResponse.IMAGES_FIELD_NUMBER, image.parts)
    parts += enclosed(GenerateImageResponse.SUMMARY_FIELD_NUMBER, [summary.SerializeToString()])
    return b"".join(parts)


class EventQueue:
    """Queue of a few events. A client that reads slowly slows its own request down; nothing accumulates."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[Event | None] = asyncio.Queue(_EVENTS_AT_ONCE)
        self._closed = False
        self.abandoned = False
        """Whether the reader is gone. `asyncio.Task.cancelling` does not show it: a task group may leave it raised."""

    async def put(self, event: Event) -> None:
        """Adds an event, once there is room for it."""
        await self._events.put(event)

    def close(self) -> None:
        """Ends the iteration after the events that are there."""
        self._closed = True
        if self._events.empty():
            self._events.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[Event]:
        while not (self._closed and self._events.empty()):
            event = await self._events.get()
            if event is None:
                return
            yield event
