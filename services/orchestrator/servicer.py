"""ImageService: the public API."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc

from klein_api.v1.image_service_pb2 import (
    GenerateImageRequest,
    GenerationSummary,
    ListModelsRequest,
    ListModelsResponse,
    StreamGenerateImageRequest,
)
from klein_api.v1.image_service_pb2_grpc import ImageServiceServicer
from services.orchestrator.catalogue import list_models
from services.orchestrator.events import ImageEvent, collected
from services.orchestrator.generation import Generation

_Context = grpc.aio.ServicerContext[Any, Any]


class ImageApi(ImageServiceServicer):
    """Answers callers; all images come from one `Generation`."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def GenerateImage(self, request: GenerateImageRequest, context: _Context) -> Any:
        """Collects what the stream would have said, into serialised bytes."""
        images: list[ImageEvent] = []
        summary = GenerationSummary()
        remaining = context.time_remaining()
        events = self._generation.events(request.spec, remaining_seconds=remaining, tells_progress=False)
        with self._generation.places.one():
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, ImageEvent):
                        images.append(event)
                    elif event.HasField("summary"):
                        summary = event.summary
            return collected(images, summary)

    async def StreamGenerateImage(
        self, request: StreamGenerateImageRequest, context: _Context
    ) -> AsyncGenerator[Any, None]:
        """Passes every event on as it happens, images as serialised bytes."""
        events = self._generation.events(
            request.spec,
            remaining_seconds=context.time_remaining(),
            preview_interval_steps=request.preview_interval_steps,
        )
        with self._generation.places.one():
            async with aclosing(events):
                async for event in events:
                    yield event.streamed() if isinstance(event, ImageEvent) else event

    async def ListModels(self, request: ListModelsRequest, context: _Context) -> ListModelsResponse:
        """Asks every stage anew."""
        generation = self._generation
        return await list_models(
            generation.table, generation.directory, generation.limits, context.time_remaining()
        )
