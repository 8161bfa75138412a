"""Open Inference Protocol, version 2, over gRPC: clients of KServe and Triton make and edit images."""

from __future__ import annotations

import asyncio
import math
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc

from klein_api.inference import grpc_inference_service_pb2 as api
from klein_api.inference.grpc_inference_service_pb2_grpc import GRPCInferenceServiceServicer
from klein_api.v1.image_service_pb2 import GenerateImageRequest, GenerationSummary
from klein_services.orchestrator.events import ImageEvent
from klein_services.orchestrator.generator import ImageGenerator
from klein_services.orchestrator.idempotency import IDEMPOTENCY_KEY, IdempotentRequests
from klein_services.orchestrator.open_inference_request import (
    INPUTS,
    OUTPUTS,
    VERSION,
    check_version,
    image_spec,
)
from klein_services.orchestrator.open_inference_tensors import bytes_tensor, int64_tensor
from klein_services.orchestrator.routing import RoutingTable
from klein_services.orchestrator.stage_directory import incompatibility
from klein_services.runtime.stage import software_version

SERVICE_NAME = "inference.GRPCInferenceService"
SERVER_NAME = "klein-suite"
PLATFORM = "klein"
_Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class OpenInference(GRPCInferenceServiceServicer):
    """Handlers of the protocol; images come from the same `ImageGenerator` as those of ImageService."""

    def __init__(self, generator: ImageGenerator, idempotent: IdempotentRequests) -> None:
        self._generator = generator
        self._idempotent = idempotent

    async def ServerLive(self, request: api.ServerLiveRequest, context: _Context) -> api.ServerLiveResponse:
        """Returns true: the server answers."""
        return api.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: api.ServerReadyRequest, context: _Context
    ) -> api.ServerReadyResponse:
        """Returns whether a model that the caller may use can be used now."""
        table = self._generator.visible_table()
        for name in table.routes:
            if await self._is_ready(table, name, context):
                return api.ServerReadyResponse(ready=True)
        return api.ServerReadyResponse(ready=False)

    async def ModelReady(self, request: api.ModelReadyRequest, context: _Context) -> api.ModelReadyResponse:
        """Returns whether the model can be used now; false for one that is not routed."""
        check_version("version", request.version)
        table = self._generator.visible_table()
        ready = request.name in table.routes and await self._is_ready(table, request.name, context)
        return api.ModelReadyResponse(ready=ready)

    async def ServerMetadata(
        self, request: api.ServerMetadataRequest, context: _Context
    ) -> api.ServerMetadataResponse:
        """Returns name and version of the suite."""
        return api.ServerMetadataResponse(name=SERVER_NAME, version=software_version())

    async def ModelMetadata(
        self, request: api.ModelMetadataRequest, context: _Context
    ) -> api.ModelMetadataResponse:
        """Returns the tensors of a model; raises UnknownModel for one that is not routed."""
        check_version("version", request.version)
        route = self._generator.visible_table().route(request.name)
        return api.ModelMetadataResponse(
            name=route.name,
            versions=[VERSION],
            platform=PLATFORM,
            inputs=[kind.metadata() for kind in INPUTS.values()],
            outputs=[kind.metadata() for kind in OUTPUTS.values()],
        )

    async def ModelInfer(self, request: api.ModelInferRequest, context: _Context) -> api.ModelInferResponse:
        """Makes the images of a request; errors are those of ImageService."""
        spec = image_spec(request)
        images: list[ImageEvent] = []
        summary = GenerationSummary()
        key = dict(context.invocation_metadata() or ()).get(IDEMPOTENCY_KEY)
        events = self._idempotent.events(
            None if key is None else str(key),
            GenerateImageRequest(spec=spec),
            lambda: self._generator.events(
                spec, remaining_seconds=context.time_remaining(), reports_progress=False
            ),
        )
        async with aclosing(events):
            async for event in events:
                if isinstance(event, ImageEvent):
                    images.append(event)
                elif event.HasField("summary"):
                    summary = event.summary
        return _response(request, sorted(images, key=lambda image: image.description.index), summary)

    async def _is_ready(self, table: RoutingTable, name: str, context: _Context) -> bool:
        remaining = context.time_remaining()
        timeout = math.inf if remaining is None else remaining / 2
        route, directory = table.routes[name], self._generator.directory
        # Asks each stage once: a probe must not wait until a stage serves, as requests do.
        answers = await asyncio.gather(*(directory.probe(address, timeout) for address in route.stages))
        described = [
            description for description, problem in answers if description is not None and not problem
        ]
        return len(described) == len(answers) and not incompatibility(route, *described)


def _response(
    request: api.ModelInferRequest, images: list[ImageEvent], summary: GenerationSummary
) -> api.ModelInferResponse:
    response = api.ModelInferResponse(model_name=summary.model, model_version=VERSION, id=request.id)
    response.parameters["request_id"].string_param = summary.request_id
    response.parameters["flow"].string_param = summary.flow
    if images:
        response.parameters["width_px"].int64_param = images[0].description.width_px
        response.parameters["height_px"].int64_param = images[0].description.height_px
    for number, warning in enumerate(summary.warnings):
        response.parameters[f"warnings[{number}]"].string_param = warning
    for name in [output.name for output in request.outputs] or OUTPUTS:
        response.outputs.add(name=name, datatype=OUTPUTS[name].datatype, shape=[len(images)])
        if name == "images":
            response.raw_output_contents.append(bytes_tensor([b"".join(image.chunks) for image in images]))
        else:
            response.raw_output_contents.append(int64_tensor([image.description.seed for image in images]))
    return response
