"""The routed models and how they are."""

from __future__ import annotations

import asyncio
import math
from contextlib import aclosing
from typing import Any

import grpc

from klein_api.v1.image_service_pb2 import (
    GenerateImageRequest,
    GenerationSummary,
    ListModelsRequest,
    ListModelsResponse,
    ModelLimits,
    RoutedModel,
    RoutedStage,
    StreamGenerateImageRequest,
)
from klein_api.v1.image_service_pb2_grpc import ImageServiceServicer, add_ImageServiceServicer_to_server
from klein_core.params import Limits
from klein_services.orchestrator.cache import TensorCache
from klein_services.orchestrator.events import ImageEvent, collected
from klein_services.orchestrator.generation import Generation
from klein_services.orchestrator.request import RequestLimits
from klein_services.orchestrator.routing import Route, RoutingTable, StageAddress
from klein_services.orchestrator.settings import OrchestratorSettings
from klein_services.orchestrator.stage_client import Channels
from klein_services.orchestrator.stage_directory import StageDirectory, misfit
from klein_services.runtime.admission import ConcurrencyLimit
from klein_services.runtime.channels import IMAGE_MESSAGE_BYTES
from klein_services.runtime.errors import DeadlinePassed
from klein_services.runtime.grpc_quirks import write_response
from klein_services.runtime.stage import Service


async def list_models(
    table: RoutingTable,
    directory: StageDirectory,
    limits: RequestLimits,
    remaining_seconds: float | None = None,
) -> ListModelsResponse:
    """Asks every stage of the table once and tells what can be requested.

    `remaining_seconds` is how long the caller waits: half of it is for the stages, so that one that does not
    answer is told as such instead of costing the caller the whole answer.
    """
    timeout = math.inf if remaining_seconds is None else remaining_seconds / 2
    addresses = list(dict.fromkeys(address for route in table.routes.values() for address in route.stages))
    answers = await asyncio.gather(*(_routed_stage(directory, address, timeout) for address in addresses))
    stages = dict(zip(addresses, answers, strict=True))
    models = [_routed_model(route, stages, limits) for route in table.routes.values()]
    return ListModelsResponse(models=models, default_model=table.default_model)


async def _routed_stage(
    directory: StageDirectory, address: StageAddress, timeout_seconds: float
) -> RoutedStage:
    description, problem = await directory.survey(address, timeout_seconds)
    return RoutedStage(target=address.target, description=description, problem=problem)


def _routed_model(
    route: Route, stages: dict[StageAddress, RoutedStage], limits: RequestLimits
) -> RoutedModel:
    facts = stages[route.denoiser].description.denoiser
    limited = route.narrowed(facts.default_size_px, facts.pixel_count)
    model = RoutedModel(name=route.name, limits=_limits(limited, limits), description=facts.description)
    for address in route.stages:
        model.stages.add().CopyFrom(stages[address])
    if not any(stage.problem for stage in model.stages):
        problem = misfit(route, *(stage.description for stage in model.stages))
        for stage in model.stages:
            stage.problem = problem
        model.serving = not problem
    model.distilled = facts.distilled
    model.default_step_count = facts.default_step_count
    model.default_guidance_scale = facts.default_guidance_scale
    model.adapters.extend(facts.adapters)
    return model


def _limits(route: Route, limits: RequestLimits) -> ModelLimits:
    bounds: Limits = limits.of(route)
    return ModelLimits(
        reference_count=bounds.reference_count,
        reference_bytes=limits.reference_bytes,
        pixel_count=bounds.pixel_count,
        image_count=bounds.image_count,
        step_count=bounds.step_count,
        default_size_px=route.default_size_px,
        adapter_count=bounds.adapter_count,
    )


_Context = grpc.aio.ServicerContext[Any, Any]


class ImageApi(ImageServiceServicer):
    """Answers callers; all images come from one `Generation`."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    async def GenerateImage(self, request: GenerateImageRequest, context: _Context) -> Any:
        """Collects what the stream would have said, into serialized bytes."""
        images: list[ImageEvent] = []
        summary = GenerationSummary()
        remaining = context.time_remaining()
        events = self._generation.events(request.spec, remaining_seconds=remaining, tells_progress=False)
        with self._generation.slots.slot():
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
        """Passes every event on as it happens, images as serialized bytes.

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
        with self._generation.slots.slot():
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


SERVICE_NAME = "klein_api.v1.ImageService"


class Orchestrator(Service):
    """Serves ImageService over the stages of a routing table; loads nothing and computes nothing."""

    name = "orchestrator"
    service_names = (SERVICE_NAME,)
    response_bytes = IMAGE_MESSAGE_BYTES

    def __init__(self, settings: OrchestratorSettings, table: RoutingTable) -> None:
        self.request_bytes = settings.limits().request_bytes
        self._channels = Channels()
        self.generation = Generation(
            table=table,
            channels=self._channels,
            directory=StageDirectory(self._channels, settings.describe_ttl_seconds),
            cache=TensorCache(settings.cache_bytes),
            limits=settings.limits(),
            slots=ConcurrencyLimit(settings.queue_limit),
            maximum_seconds=settings.maximum_request_seconds,
            image_metadata=settings.image_metadata,
        )

    def register(self, server: grpc.aio.Server) -> None:
        add_ImageServiceServicer_to_server(ImageApi(self.generation), server)

    async def load(self) -> None:
        """Has nothing to load; stages are asked what they are when they are first needed."""

    async def drain(self) -> None:
        """Has nothing to tell anybody; running requests keep their stage calls."""

    async def close(self) -> None:
        await self._channels.close()
