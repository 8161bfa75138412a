"""The denoiser as the server sees it: load, warm up, serve, close."""

from __future__ import annotations

import asyncio

import grpc

from klein_api.v1 import denoiser_service_pb2_grpc, stage_service_pb2
from klein_core.variants import default_guidance_scale, default_step_count
from services.denoiser.loading import load_denoiser
from services.denoiser.servicer import SERVICE_NAME, Denoiser, DenoiserServicer
from services.denoiser.settings import DenoiserSettings
from services.denoiser.step_metrics import OPERATION, STAGE
from services.runtime import stages
from services.runtime.application import Application
from services.runtime.errors import StageUnavailable
from services.runtime.tensors import dtype_name
from services.runtime.worker import Worker

NEWCOMER_SIDE_PX = 1024
"""Size of the request whose wait DescribeStage tells."""


class DenoiserApplication(Application):
    """Serves the flow transformer of one checkpoint."""

    name = STAGE
    service_names = (SERVICE_NAME,)
    open_service_names = (stages.SERVICE_NAME,)
    operations = (OPERATION,)

    def __init__(self, settings: DenoiserSettings) -> None:
        self._settings = settings
        self._denoiser: Denoiser | None = None
        self._preparation = Worker(f"{STAGE}-preparation", settings.queue_limit)
        self._stage = stages.StageServicer(
            stage=STAGE, model=settings.model_name, load=self._load_told, complete=self._tell_adapters
        )

    def register(self, server: grpc.aio.Server) -> None:
        servicer = DenoiserServicer(self._require_loaded)
        denoiser_service_pb2_grpc.add_DenoiserServiceServicer_to_server(servicer, server)
        self._stage.register(server)

    async def load(self) -> None:
        loaded = await self._preparation.run(lambda: load_denoiser(self._settings, self._preparation))
        denoiser = loaded.value
        denoiser.engine.start()
        self._denoiser = denoiser
        model = denoiser.model
        facts = stage_service_pb2.DenoiserFacts(
            distilled=model.is_distilled,
            default_step_count=default_step_count(model.is_distilled),
            default_guidance_scale=default_guidance_scale(model.is_distilled),
            embedding_channels=model.embedding_channels,
            latent_channels=model.latent_channels,
            adapter_count=denoiser.limits.adapter_count,
        )
        self._stage.loaded(
            device=str(denoiser.workload.device),
            dtype=dtype_name(model.dtype),
            weights_digest=model.weights_digest,
            facts=facts,
        )

    async def drain(self) -> None:
        self._stage.draining()

    async def close(self) -> None:
        if self._denoiser is not None:
            await asyncio.to_thread(self._denoiser.engine.close)
            self._denoiser.adapters.close()
        self._preparation.close()

    def utilization(self) -> float | None:
        """Returns admitted requests over those that one step takes."""
        if self._denoiser is None:
            return 0.0
        load = self._denoiser.engine.load(self._denoiser.workload.newcomer(NEWCOMER_SIDE_PX))
        return (load.queued_count + load.running_count) / load.capacity

    def _load_told(self) -> stage_service_pb2.StageLoad:
        told = stage_service_pb2.StageLoad(queue_limit=self._settings.queue_limit)
        if self._denoiser is None:
            return told
        load = self._denoiser.engine.load(self._denoiser.workload.newcomer(NEWCOMER_SIDE_PX))
        told.queued_count, told.running_count = load.queued_count, load.running_count
        if load.estimated_wait_seconds is not None:
            told.estimated_wait.CopyFrom(stages.duration(load.estimated_wait_seconds))
        return told

    async def _tell_adapters(self, description: stage_service_pb2.DescribeStageResponse) -> None:
        """Adds what the folder holds now, which changes while the stage serves."""
        if self._denoiser is not None:
            description.denoiser.adapters.extend(await self._denoiser.adapters.descriptions())

    def _require_loaded(self) -> Denoiser:
        if self._denoiser is None:
            raise StageUnavailable("the model is not loaded")
        return self._denoiser
