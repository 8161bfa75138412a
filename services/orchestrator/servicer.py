"""ImageService: the public API."""

from __future__ import annotations

import asyncio
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
from services.runtime.calls import write_response
from services.runtime.errors import DeadlinePassed

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

    async def StreamGenerateImage(  # type: ignore[override]  # stubs foresee generators only
        self, request: StreamGenerateImageRequest, context: _Context
    ) -> None:
        """Passes every event on as it happens, images as serialised bytes.

        Writes them itself because a generator cannot end while its caller leaves a message unread: a request
        keeps its place for `maximum_seconds` at most, whatever its caller does.

        Raises:
            DeadlinePassed: the request took longer, or its caller did not read.
        """
        events = self._generation.events(
            request.spec,
            remaining_seconds=context.time_remaining(),
            preview_interval_steps=request.preview_interval_steps,
        )
        seconds = self._generation.maximum_seconds
        with self._generation.places.one():
            try:
                async with asyncio.timeout(seconds), aclosing(events):
                    async for event in events:
                        message = event.streamed() if isinstance(event, ImageEvent) else event
                        await write_response(message, context)
            except TimeoutError:
                raise DeadlinePassed(
                    f"the request was not finished and its events not read within {seconds:g} s"
                ) from None

    async def ListModels(self, request: ListModelsRequest, context: _Context) -> ListModelsResponse:
        """Asks every stage anew."""
        generation = self._generation
        return await list_models(
            generation.table, generation.directory, generation.limits, context.time_remaining()
        )
