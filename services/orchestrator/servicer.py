"""ImageService: the public API."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc
from klein_api.v1.image_service_pb2 import (
    GenerateImageRequest,
    GenerateImageResponse,
    ImageSpec,
    ListModelsRequest,
    ListModelsResponse,
    StreamGenerateImageRequest,
    StreamGenerateImageResponse,
)
from klein_api.v1.image_service_pb2_grpc import ImageServiceServicer

from services.orchestrator.catalogue import list_models
from services.orchestrator.failures import StageFailure
from services.orchestrator.generation import Generation

_Context = grpc.aio.ServicerContext[Any, Any]


class ImageApi(ImageServiceServicer):
    """Answers callers; all images come from one `Generation`."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def GenerateImage(self, request: GenerateImageRequest, context: _Context) -> GenerateImageResponse:
        """Collects what the stream would have said."""
        response = GenerateImageResponse()
        async with aclosing(self._events(request.spec, 0, context)) as events:
            async for event in events:
                match event.WhichOneof("event"):
                    case "image":
                        response.images.append(event.image)
                    case "summary":
                        response.summary.CopyFrom(event.summary)
        response.images.sort(key=lambda image: image.index)
        return response

    async def StreamGenerateImage(
        self, request: StreamGenerateImageRequest, context: _Context
    ) -> AsyncGenerator[StreamGenerateImageResponse, None]:
        """Passes every event on as it happens."""
        async with aclosing(self._events(request.spec, request.preview_interval_steps, context)) as events:
            async for event in events:
                yield event

    async def ListModels(self, request: ListModelsRequest, context: _Context) -> ListModelsResponse:
        """Asks every stage anew."""
        generation = self._generation
        return await list_models(generation.table, generation.directory, generation.limits)

    async def _events(
        self, spec: ImageSpec, preview_interval_steps: int, context: _Context
    ) -> AsyncGenerator[StreamGenerateImageResponse, None]:
        try:
            async with aclosing(
                self._generation.events(spec, preview_interval_steps, context.time_remaining())
            ) as events:
                async for event in events:
                    yield event
        except StageFailure as failure:
            await failure.abort(context)
