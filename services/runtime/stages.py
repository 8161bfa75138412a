"""What every stage tells of itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import metadata

import grpc
from google.protobuf.duration_pb2 import Duration

from klein_api.v1 import stage_service_pb2, stage_service_pb2_grpc
from services.runtime import metrics
from services.runtime.errors import UnknownModel
from services.runtime.worker import Worker

SERVICE_NAME = "klein_api.v1.StageService"
Facts = (
    stage_service_pb2.TextEncoderFacts | stage_service_pb2.DenoiserFacts | stage_service_pb2.VaeDecoderFacts
)
Complete = Callable[[stage_service_pb2.DescribeStageResponse], Awaitable[None]]


def software_version() -> str:
    """Returns the installed version of the suite."""
    try:
        return metadata.version("klein-suite")
    except metadata.PackageNotFoundError:
        return "unknown"


class StageServicer(stage_service_pb2_grpc.StageServiceServicer):
    """Answers DescribeStage in every state; facts are there once the model is.

    Args:
        stage: text-encoder, denoiser or vae-decoder.
        model: the name that requests may give.
        load: returns how busy the stage is.
        complete: adds to each description what changes while the stage serves.
    """

    def __init__(
        self,
        *,
        stage: str,
        model: str,
        load: Callable[[], stage_service_pb2.StageLoad],
        complete: Complete | None = None,
    ) -> None:
        self._complete = complete
        self.stage = stage
        self.model = model
        self._load = load
        self._description = stage_service_pb2.DescribeStageResponse(
            stage=stage, model=model, version=software_version()
        )

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the service to a server."""
        stage_service_pb2_grpc.add_StageServiceServicer_to_server(self, server)

    def loaded(self, *, device: str, dtype: str, weights_digest: str, facts: Facts) -> None:
        """Takes what is known once the model is loaded; the stage counts as serving from here on."""
        description = self._description
        description.device, description.dtype, description.serving = device, dtype, True
        description.weights_digest = weights_digest
        match facts:
            case stage_service_pb2.TextEncoderFacts():
                description.text_encoder.CopyFrom(facts)
            case stage_service_pb2.DenoiserFacts():
                description.denoiser.CopyFrom(facts)
            case stage_service_pb2.VaeDecoderFacts():
                description.vae_decoder.CopyFrom(facts)
        metrics.INFO.labels(self.stage, self.model, device, dtype, description.version).set(1)

    def draining(self) -> None:
        """Makes the stage count as not serving."""
        self._description.serving = False

    async def DescribeStage(
        self,
        request: stage_service_pb2.DescribeStageRequest,
        context: grpc.aio.ServicerContext[
            stage_service_pb2.DescribeStageRequest, stage_service_pb2.DescribeStageResponse
        ],
    ) -> stage_service_pb2.DescribeStageResponse:
        response = stage_service_pb2.DescribeStageResponse()
        response.CopyFrom(self._description)
        response.load.CopyFrom(self._load())
        if self._complete is not None:
            await self._complete(response)
        return response


def worker_load(worker: Worker) -> stage_service_pb2.StageLoad:
    """Returns how busy a stage with one worker is."""
    load = stage_service_pb2.StageLoad(
        queued_count=worker.queued_count, running_count=worker.running_count, queue_limit=worker.queue_limit
    )
    if worker.estimated_wait_seconds is not None:
        load.estimated_wait.CopyFrom(duration(worker.estimated_wait_seconds))
    return load


def duration(seconds: float) -> Duration:
    """Returns a protobuf duration, exact to the nanosecond."""
    whole = int(seconds)
    return Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))


def require_model(requested: str, served: str) -> None:
    """Checks the model name of a request; an empty one means whichever is served.

    Raises:
        UnknownModel: another one is served here.
    """
    if requested and requested != served:
        raise UnknownModel("model", requested, (served,))
