"""The folder of adapters that requests may name. Torch-free."""

from __future__ import annotations

import asyncio
import gc
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

import torch

from klein_api.v1.stage_service_pb2 import AdapterDescription
from klein_core.checkpoint.files import is_inside
from klein_core.denoiser.adapters.adapter import Adapter, ScaledAdapter
from klein_core.denoiser.adapters.key_mapping import Layers, layer_targets
from klein_core.denoiser.adapters.parse import FileState
from klein_core.denoiser.adapters.reader import describe_adapter, read_adapter
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.errors import CheckpointError
from klein_core.params import ADAPTER_NAME, AdapterChoice
from klein_services.denoiser.job import STAGE
from klein_services.denoiser.settings import DenoiserSettings
from klein_services.runtime.errors import AdapterMemoryFull, UnknownAdapter, UnusableAdapter
from klein_services.runtime.metrics import ADAPTER_LOADS, CACHE_BYTES, CACHE_EVICTIONS, CACHE_REQUESTS
from klein_services.runtime.worker import Worker

SUFFIX = ".safetensors"


class AdapterFolder:
    """Every `NAME.safetensors` in one folder, as it is at the moment of asking.

    Args:
        folder: `None` offers nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        """Returns what is offered, sorted. Touches the file system: not for the event loop."""
        if self._folder is None:
            return []
        stems = (path.name.removesuffix(SUFFIX) for path in self._folder.glob(f"*{SUFFIX}"))
        return sorted(name for name in stems if self.path(name) is not None)

    def path(self, name: str) -> Path | None:
        """Returns an adapter's file; `None` when it is not offered.

        Names that could be paths are none, and a link that leaves the folder offers nothing.
        """
        if self._folder is None or not ADAPTER_NAME.fullmatch(name):
            return None
        path = self._folder / f"{name}{SUFFIX}"
        return path if path.is_file() and is_inside(path, self._folder) else None


_Described = tuple[FileState, AdapterDescription]


class AdapterCatalog:
    """Describes adapters by the headers of their files, each read once for as long as it stays the same.

    Args:
        folder: what is offered.
        layers: what the model has.
    """

    def __init__(self, folder: AdapterFolder, layers: Layers) -> None:
        self._folder = folder
        self._layers = layers
        self._known: dict[str, _Described] = {}

    def descriptions(self) -> list[AdapterDescription]:
        """Returns all adapters by name, the unusable ones with their problem. Slow: not for the event loop."""
        found: dict[str, _Described] = {}
        for name in self._folder.names():
            path = self._folder.path(name)
            described = None if path is None else self._described(name, path)
            if described is not None:
                found[name] = described
        # Replaced as a whole, so that callers on several threads do not meet half a table.
        self._known = found
        return [description for _, description in found.values()]

    def _described(self, name: str, path: Path) -> _Described | None:
        """Returns what is known of a file in its present state; `None` when it has just gone."""
        try:
            state = FileState.of(path)
        except CheckpointError:
            return None
        known = self._known.get(name)
        if known is not None and known[0] == state:
            return known
        try:
            summary = describe_adapter(path, self._layers)
        except CheckpointError as error:
            return state, AdapterDescription(name=name, size_bytes=state.size_bytes, problem=str(error))
        return state, AdapterDescription(
            name=name,
            kind=summary.kind,
            rank=summary.rank,
            layer_count=summary.layer_count,
            size_bytes=summary.size_bytes,
        )


class AdapterRegistry:
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
        self._catalog = AdapterCatalog(folder, layers)
        self._cache = AdapterCache(folder, read, device, settings.adapter_memory_mib * 2**20)
        self._worker = Worker(f"{STAGE}-adapters", settings.queue_limit)

    @classmethod
    def of(cls, settings: DenoiserSettings, transformer: FlowTransformer) -> AdapterRegistry:
        """Offers what fits a network."""
        return cls(settings, layer_targets(transformer), transformer.device, transformer.dtype)

    async def load(self, choices: Sequence[AdapterChoice]) -> tuple[ScaledAdapter, ...]:
        """Returns a request's adapters; raises as `AdapterCache.scaled`, and QueueFull."""
        return (await self._worker.run(lambda: self._cache.scaled(choices))).value

    async def descriptions(self) -> list[AdapterDescription]:
        """Returns what is offered at this moment, by name."""
        return await asyncio.to_thread(self._catalog.descriptions)

    def close(self) -> None:
        """Refuses what waits."""
        self._worker.close()


ADAPTER: Final = "adapter"
HIT, MISS = "hit", "miss"
_Version = tuple[str, FileState]
"""An adapter's name and the state of its file: a replaced file is another adapter."""


class AdapterCache:
    """Keeps the most recently used adapters within a bound. For one thread.

    Requests hold the adapters that they use, so one that was evicted or whose file was replaced stays until its last
    request ends, and counts until then.

    Args:
        folder: what is offered.
        read: reads a file into host memory. Raises CheckpointError.
        device: where adapters go.
        limit_bytes: most bytes on the device, those in use included.
    """

    def __init__(
        self,
        folder: AdapterFolder,
        read: Callable[[Path], Adapter],
        device: torch.device,
        limit_bytes: int,
    ) -> None:
        self._folder = folder
        self._read = read
        self._device = device
        self._limit_bytes = limit_bytes
        self._recent: OrderedDict[_Version, Adapter] = OrderedDict()
        self._held: WeakValueDictionary[_Version, Adapter] = WeakValueDictionary()
        self._refused: dict[str, tuple[FileState, str]] = {}

    @property
    def size_bytes(self) -> int:
        """Bytes on the device, of adapters that are kept and of those that only requests hold."""
        return sum(adapter.size_bytes for adapter in self._held.values())

    def scaled(self, choices: Sequence[AdapterChoice]) -> tuple[ScaledAdapter, ...]:
        """Returns a request's adapters, loaded where they are not there or their file was replaced.

        Raises:
            UnknownAdapter: a name is not offered.
            UnusableAdapter: a file cannot be applied.
            AdapterMemoryFull: adapters in use leave no room.
        """
        return tuple(
            ScaledAdapter(self._adapter(f"adapters[{index}].name", choice.name), choice.scale)
            for index, choice in enumerate(choices)
        )

    def _adapter(self, field: str, name: str) -> Adapter:
        path = self._folder.path(name)
        if path is None:
            raise UnknownAdapter(field, name, self._folder.names())
        try:
            version = (name, FileState.of(path))
            adapter = self._held.get(version)
            CACHE_REQUESTS.labels(ADAPTER, MISS if adapter is None else HIT).inc()
            if adapter is None:
                adapter = self._load(path, version)
        except CheckpointError as error:
            raise UnusableAdapter(field, name, str(error)) from None
        self._recent[version] = adapter
        self._recent.move_to_end(version)
        CACHE_BYTES.labels(ADAPTER).set(self.size_bytes)
        return adapter

    def _load(self, path: Path, version: _Version) -> Adapter:
        """Reads a file once for each of its states, also where it turns out to be of no use."""
        name, state = version
        refused = self._refused.get(name)
        if refused is not None and refused[0] == state:
            raise CheckpointError(refused[1])
        try:
            adapter = self._read_within_limit(path)
        except CheckpointError as error:
            ADAPTER_LOADS.labels("refused").inc()
            self._refused[name] = (state, str(error))
            raise
        self._drop_other_versions(name)
        self._make_room(name, adapter.size_bytes)
        adapter = adapter.to(self._device)
        self._held[version] = adapter
        ADAPTER_LOADS.labels("loaded").inc()
        return adapter

    def _read_within_limit(self, path: Path) -> Adapter:
        adapter = self._read(path)
        if adapter.size_bytes > self._limit_bytes:
            raise CheckpointError(
                f"{path.name} takes {adapter.size_bytes} bytes; KLEIN_ADAPTER_MEMORY_MIB allows {self._limit_bytes}"
            )
        return adapter

    def _drop_other_versions(self, name: str) -> None:
        for version in [version for version in self._recent if version[0] == name]:
            del self._recent[version]

    def _make_room(self, name: str, size_bytes: int) -> None:
        """Lets go of the least recently used until so much more fits; what a request holds frees nothing yet."""
        while self._recent and self.size_bytes + size_bytes > self._limit_bytes:
            self._recent.popitem(last=False)
            CACHE_EVICTIONS.labels(ADAPTER).inc()
        if self.size_bytes + size_bytes > self._limit_bytes:
            # Of requests that failed, something may still hang in a reference cycle.
            gc.collect()
        if self.size_bytes + size_bytes > self._limit_bytes:
            raise AdapterMemoryFull(name, self._limit_bytes)
