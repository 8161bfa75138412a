"""The adapters that a denoiser offers: what it tells of them, and how requests get them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import torch

from klein_api.v1.stage_service_pb2 import AdapterDescription
from klein_core.denoiser.adapters.adapter import Adapter, ScaledAdapter
from klein_core.denoiser.adapters.layers import Layers, named_layers
from klein_core.denoiser.adapters.reader import read_adapter
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.params import AdapterChoice
from services.denoiser.adapter_cache import AdapterCache
from services.denoiser.adapter_catalogue import AdapterCatalogue
from services.denoiser.adapter_folder import AdapterFolder
from services.denoiser.settings import DenoiserSettings
from services.denoiser.step_metrics import STAGE
from services.runtime.worker import Worker


class OfferedAdapters:
    """Reads files on a thread of its own: neither on the event loop nor between steps.

    Args:
        settings: which folder, and how much memory.
        layers: what the model has.
        device, dtype: the model's.
    """

    def __init__(
        self, settings: DenoiserSettings, layers: Layers, device: torch.device, dtype: torch.dtype
    ) -> None:
        def read(path: Path) -> Adapter:
            return read_adapter(path, layers, device="cpu", dtype=dtype)

        folder = AdapterFolder(Path(settings.adapters_folder) if settings.adapters_folder else None)
        self._catalogue = AdapterCatalogue(folder, layers)
        self._cache = AdapterCache(folder, read, device, settings.adapter_memory_mib * 2**20)
        self._worker = Worker(f"{STAGE}-adapters", settings.queue_limit)

    @classmethod
    def of(cls, settings: DenoiserSettings, transformer: FlowTransformer) -> OfferedAdapters:
        """Offers what fits a network."""
        return cls(settings, named_layers(transformer), transformer.device, transformer.dtype)

    async def load(self, choices: Sequence[AdapterChoice]) -> tuple[ScaledAdapter, ...]:
        """Returns a request's adapters; raises as `AdapterCache.scaled`, and QueueFull."""
        return (await self._worker.run(lambda: self._cache.scaled(choices))).value

    async def descriptions(self) -> list[AdapterDescription]:
        """Returns what is offered at this moment, by name."""
        return await asyncio.to_thread(self._catalogue.descriptions)

    def close(self) -> None:
        """Refuses what waits."""
        self._worker.close()
