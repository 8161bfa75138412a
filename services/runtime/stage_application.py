"""What the text-encoder and the vae-decoder have in common: one model behind one worker."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import grpc

from klein_api.v1 import stage_service_pb2
from services.runtime.application import Application
from services.runtime.settings import StageSettings
from services.runtime.stages import SERVICE_NAME, Facts, StageServicer, worker_load
from services.runtime.worker import Worker


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a stage knows of its model once it is loaded."""

    device: str
    """Where it computes, for example `cuda:0`."""
    dtype: str
    """Element type of its weights and of the tensors that it sends: bf16, f16 or f32."""
    weights_digest: str
    """See `klein_core.weights_digest`."""
    facts: Facts


class StageApplication(Application, ABC):
    """A stage whose requests are computed one after the other.

    Subclasses set `name`, `service_names` and `operations`, register their servicer and load their model.
    """

    open_service_names = (SERVICE_NAME,)

    def __init__(self, settings: StageSettings) -> None:
        self.worker = Worker(self.name, settings.queue_limit)
        self.description = StageServicer(stage=self.name, model=settings.model_name, load=self.current_load)

    @abstractmethod
    def load_model(self) -> Loaded:
        """Loads and warms up the model; runs on the worker. Raises CheckpointError or SettingsError."""

    def current_load(self) -> stage_service_pb2.StageLoad:
        """Returns how busy the worker is."""
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
    """Returns a call's deadline as `time.monotonic()` counts; `None` when it has none."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining
