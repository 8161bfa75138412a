"""Adapters on the device: loaded when a request names them, kept while there is room."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

import torch

from klein_core.denoiser.adapters.adapter import Adapter, ScaledAdapter
from klein_core.denoiser.adapters.file import FileState
from klein_core.errors import CheckpointError
from klein_core.params import AdapterChoice
from services.denoiser.adapter_folder import AdapterFolder
from services.runtime.errors import AdapterMemoryFull, UnknownAdapter, UnusableAdapter
from services.runtime.metrics import ADAPTER_LOADS, CACHE_BYTES, CACHE_EVICTIONS, CACHE_REQUESTS

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
