"""AdapterRegistry: the adapters that requests may name, described by their files and cached on the device."""

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
from klein_core.checkpoint.header import FileState
from klein_core.denoiser.adapters.adapter import Adapter, ScaledAdapter
from klein_core.denoiser.adapters.key_mapping import Layers, layer_targets
from klein_core.denoiser.adapters.reader import describe_adapter, read_adapter
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.errors import CheckpointError
from klein_core.params import ADAPTER_NAME, AdapterChoice
from klein_services.denoiser.scheduled_request import STAGE
from klein_services.denoiser.settings import DenoiserSettings
from klein_services.runtime.errors import AdapterMemoryFull, UnknownAdapter, UnusableAdapter
from klein_services.runtime.metrics import (
    ADAPTER_LOADS,
    CACHE_BYTES,
    CACHE_EVICTIONS,
    CACHE_REQUESTS,
    initialize_caches,
)
from klein_services.runtime.worker import Worker

SUFFIX = ".safetensors"
ADAPTER: Final = "adapter"
HIT, MISS = "hit", "miss"

_Described = tuple[FileState, AdapterDescription]
_Version = tuple[str, FileState]
"""An adapter's name and the state of its file: a replaced file is another version."""


class AdapterRegistry:
    """Every `NAME.safetensors` in one folder, read anew whenever a file changes.

    Files are read on a separate thread: neither on the event loop nor between steps.

    Args:
        settings: the folder, and the limits of memory and of waiting loads.
        layers: the model's layers that adapters may target.
        device: the model's device.
        dtype: the model's element type.
    """

    def __init__(
        self, settings: DenoiserSettings, layers: Layers, device: torch.device, dtype: torch.dtype
    ) -> None:
        def read(path: Path) -> Adapter:
            return read_adapter(path, layers, device="cpu", dtype=dtype)

        self._folder = AdapterFolder(Path(settings.adapters_folder) if settings.adapters_folder else None)
        self._layers = layers
        self._described: dict[str, _Described] = {}
        self._cache = AdapterCache(self._folder, read, device, settings.adapter_memory_mib * 2**20)
        self._worker = Worker(f"{STAGE}-adapters", settings.queue_limit)

    @classmethod
    def of(cls, settings: DenoiserSettings, transformer: FlowTransformer) -> AdapterRegistry:
        """Returns the registry of adapters for a transformer."""
        return cls(settings, layer_targets(transformer), transformer.device, transformer.dtype)

    async def load(self, choices: Sequence[AdapterChoice]) -> tuple[ScaledAdapter, ...]:
        """Returns a request's adapters on the device.

        Raises:
            UnknownAdapter, UnusableAdapter, AdapterMemoryFull: see `AdapterCache.load`.
            QueueFull: too many requests wait for their adapters.
        """
        if not choices:
            return ()
        return (await self._worker.run(lambda: self._cache.load(choices))).value

    async def descriptions(self) -> list[AdapterDescription]:
        """Returns descriptions of the adapters in the folder now, by name; unusable ones state their problem."""
        return await asyncio.to_thread(self._describe_all)

    def close(self) -> None:
        """Stops the thread; waiting loads raise StageUnavailable."""
        self._worker.close()

    def _describe_all(self) -> list[AdapterDescription]:
        described: dict[str, _Described] = {}
        for name in self._folder.names():
            path = self._folder.path(name)
            found = None if path is None else self._describe(name, path)
            if found is not None:
                described[name] = found
        # Replaced as a whole: calls on several threads must not see a partial table.
        self._described = described
        return [description for _, description in described.values()]

    def _describe(self, name: str, path: Path) -> _Described | None:
        """Describes a file by its header, read once per state; returns `None` if the file has just been deleted."""
        try:
            state = FileState.of(path)
        except CheckpointError:
            return None
        described = self._described.get(name)
        if described is not None and described[0] == state:
            return described
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
            notes=summary.notes,
        )


class AdapterFolder:
    """Names and files of the adapters in a folder, looked up at each call.

    Args:
        folder: the folder; `None` has no adapters.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        """Returns the names of all adapters, sorted. Reads the file system: call it off the event loop."""
        if self._folder is None:
            return []
        stems = (path.name.removesuffix(SUFFIX) for path in self._folder.glob(f"*{SUFFIX}"))
        return sorted(name for name in stems if self.path(name) is not None)

    def path(self, name: str) -> Path | None:
        """Returns an adapter's file, or `None` if there is none.

        Names that could be paths, and links that leave the folder, have no file.
        """
        if self._folder is None or not ADAPTER_NAME.fullmatch(name):
            return None
        path = self._folder / f"{name}{SUFFIX}"
        return path if path.is_file() and is_inside(path, self._folder) else None


class AdapterCache:
    """LRU of adapters on the device, within a byte limit. Not thread-safe.

    Requests hold references to their adapters. One that was evicted, or whose file was replaced, stays on the device
    until the last of its requests ends, and counts until then.

    Args:
        folder: where adapters are found.
        read: reads a file into host memory; raises CheckpointError.
        device: where adapters go.
        limit_bytes: most bytes on the device, including adapters in use.
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
        self._alive: WeakValueDictionary[_Version, Adapter] = WeakValueDictionary()
        self._refused: dict[str, tuple[FileState, str]] = {}
        initialize_caches((ADAPTER,))
        for outcome in ("loaded", "refused"):
            ADAPTER_LOADS.labels(outcome)

    @property
    def size_bytes(self) -> int:
        """Bytes on the device, of cached adapters and of evicted ones that requests still hold."""
        return sum(adapter.size_bytes for adapter in self._alive.values())

    def load(self, choices: Sequence[AdapterChoice]) -> tuple[ScaledAdapter, ...]:
        """Returns a request's adapters, reading files that are not cached or were replaced.

        Raises:
            UnknownAdapter: no adapter has that name.
            UnusableAdapter: a file cannot be applied to the model.
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
            adapter = self._alive.get(version)
            CACHE_REQUESTS.labels(ADAPTER, MISS if adapter is None else HIT).inc()
            if adapter is None:
                adapter = self._read_to_device(path, version)
        except CheckpointError as error:
            raise UnusableAdapter(field, name, str(error)) from None
        self._recent[version] = adapter
        self._recent.move_to_end(version)
        CACHE_BYTES.labels(ADAPTER).set(self.size_bytes)
        return adapter

    def _read_to_device(self, path: Path, version: _Version) -> Adapter:
        """Reads a file once per state; an unusable one raises its first error again until it changes."""
        name, state = version
        refused = self._refused.get(name)
        if refused is not None and refused[0] == state:
            raise CheckpointError(refused[1])
        try:
            adapter = self._read(path)
            if adapter.size_bytes > self._limit_bytes:
                raise CheckpointError(
                    f"{path.name} takes {adapter.size_bytes} bytes; "
                    f"KLEIN_ADAPTER_MEMORY_MIB allows {self._limit_bytes}"
                )
        except CheckpointError as error:
            ADAPTER_LOADS.labels("refused").inc()
            self._refused[name] = (state, str(error))
            raise
        for other in [other for other in self._recent if other[0] == name]:
            del self._recent[other]
        self._make_room(name, adapter.size_bytes)
        adapter = adapter.to(self._device)
        self._alive[version] = adapter
        ADAPTER_LOADS.labels("loaded").inc()
        return adapter

    def _make_room(self, name: str, size_bytes: int) -> None:
        """Evicts adapters, least recently used first, until `size_bytes` more fit; those in use free nothing yet."""
        while self._recent and self.size_bytes + size_bytes > self._limit_bytes:
            self._recent.popitem(last=False)
            CACHE_EVICTIONS.labels(ADAPTER).inc()
        if self.size_bytes + size_bytes > self._limit_bytes:
            # Failed requests may still hold adapters through reference cycles.
            gc.collect()
        if self.size_bytes + size_bytes > self._limit_bytes:
            raise AdapterMemoryFull(name, self._limit_bytes)
