"""Service: what `Server` runs. ModelService and DescribeStage: what all stages have in common."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Protocol

import grpc
from google.protobuf.duration_pb2 import Duration

from klein_api.v1 import stage_service_pb2, stage_service_pb2_grpc
from klein_services.runtime import metrics
from klein_services.runtime.channels import STAGE_MESSAGE_BYTES
from klein_services.runtime.errors import UnknownModel
from klein_services.runtime.stage_settings import StageSettings
from klein_services.runtime.worker import Worker

if TYPE_CHECKING:
    from klein_services.runtime.interceptors import Guard


class Service(Protocol):
    """The interface that a stage or the orchestrator implements to be run by `Server`.

    Implementations inherit from it, for the defaults below.
    """

    name: str
    """Label of metrics and traces: text-encoder, denoiser, vae-decoder or orchestrator."""
    service_names: tuple[str, ...]
    """Full names of the gRPC services that take calls only while the server serves."""
    open_service_names: tuple[str, ...] = ()
    """Full names of further gRPC services, which answer in every state; for reflection and metrics."""
    operations: Sequence[str] = ()
    """The `operation` of each `Worker.run`, so that its metrics exist from the start."""

    reload: Callable[[], Awaitable[None]] | None = None
    """Called on SIGHUP to read again what may change while the service serves; without it SIGHUP ends the process."""

    request_bytes: int = STAGE_MESSAGE_BYTES
    """Largest message that the server receives."""
    response_bytes: int = STAGE_MESSAGE_BYTES
    """Largest message that the server sends."""
    is_public: bool = False
    """Whether clients call it that are not of the suite: what they send about their identity is not believed."""
    guard: Guard | None = None
    """Decides which calls may be made at all; `None` lets all pass."""

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the gRPC services to a server that has not started yet."""

    async def load(self) -> None:
        """Loads and warms up. Must not compute on the event loop, and may be cancelled.

        Raises:
            CheckpointError, SettingsError: the service cannot serve; the text is one clear sentence.
        """

    async def drain(self) -> None:
        """Called when the server begins to drain; returns at once."""

    async def close(self) -> None:
        """Frees all resources. The last call, also after a failed or cancelled load."""

    def utilization(self) -> float | None:
        """Returns outstanding work over capacity, for balancing by load; `None` reports nothing."""
        return None


STAGE_SERVICE = "klein_api.v1.StageService"
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


class DescribeStageServicer(stage_service_pb2_grpc.StageServiceServicer):
    """Implements StageService: answers DescribeStage in every state, with facts once the model is loaded.

    Args:
        stage: text-encoder, denoiser or vae-decoder.
        model: the name that requests may give.
        load: returns the stage's load.
        complete: adds to each answer what changes while the stage serves.
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
        """Adds the facts of the loaded model; from here on the stage is described as serving."""
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
        """From here on the stage is described as not serving."""
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
    """Returns the load of a stage with one worker."""
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
    """Checks the model name of a request; an empty one means the served model.

    Raises:
        UnknownModel: another one is served here.
    """
    if requested and requested != served:
        raise UnknownModel("model", requested, (served,))


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Facts about a model that are known once it is loaded."""

    device: str
    """Device that computes, for example `cuda:0`."""
    dtype: str
    """Element type of its weights and of the tensors that it sends: bf16, f16 or f32."""
    weights_digest: str
    """See `klein_core.checkpoint.weights`."""
    facts: Facts


class ModelService(Service, ABC):
    """A stage whose requests are computed one after the other.

    Subclasses set `name`, `service_names` and `operations`, register their servicer and load their model.
    """

    open_service_names = (STAGE_SERVICE,)

    def __init__(self, settings: StageSettings) -> None:
        self.worker = Worker(self.name, settings.queue_limit)
        self.description = DescribeStageServicer(
            stage=self.name, model=settings.model_name, load=self.current_load
        )

    @abstractmethod
    def load_model(self) -> Loaded:
        """Loads and warms up the model; runs on the worker. Raises CheckpointError or SettingsError."""

    def current_load(self) -> stage_service_pb2.StageLoad:
        """Returns the load of the worker."""
        return worker_load(self.worker)

    def register(self, server: grpc.aio.Server) -> None:
        self.description.register(server)

    async def load(self) -> None:
        loaded = (await self.worker.run(self.load_model)).value
        self.description.loaded(
            device=loaded.device, dtype=loaded.dtype, weights_digest=loaded.weights_digest, facts=loaded.facts
        )

    async def drain(self) -> None:
        self.description.draining()

    async def close(self) -> None:
        self.worker.close()

    def utilization(self) -> float:
        return float(self.worker.queued_count + self.worker.running_count)


def deadline_of(context: grpc.aio.ServicerContext[Any, Any]) -> float | None:
    """Returns a call's deadline as a reading of `time.monotonic()`; `None` when it has none."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining
