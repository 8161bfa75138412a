"""The routed models and how they are."""

from __future__ import annotations

import asyncio
import math

from klein_api.v1.image_service_pb2 import ListModelsResponse, ModelLimits, RoutedModel, RoutedStage
from klein_core.params import Limits
from services.orchestrator.request import RequestLimits
from services.orchestrator.routing import Route, RoutingTable, StageAddress
from services.orchestrator.stages import StageDirectory, misfit


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
    model = RoutedModel(name=route.name, limits=_limits(route, limits))
    for address in route.stages:
        model.stages.add().CopyFrom(stages[address])
    if not any(stage.problem for stage in model.stages):
        problem = misfit(route, *(stage.description for stage in model.stages))
        for stage in model.stages:
            stage.problem = problem
        model.serving = not problem
    facts = stages[route.denoiser].description.denoiser
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
