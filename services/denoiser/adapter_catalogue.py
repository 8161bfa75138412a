"""What a denoiser tells of the adapters that it offers."""

from __future__ import annotations

from pathlib import Path

from klein_api.v1.stage_service_pb2 import AdapterDescription
from klein_core.denoiser.adapters.file import FileState
from klein_core.denoiser.adapters.layers import Layers
from klein_core.denoiser.adapters.reader import describe_adapter
from klein_core.errors import CheckpointError
from services.denoiser.adapter_folder import AdapterFolder

_Described = tuple[FileState, AdapterDescription]


class AdapterCatalogue:
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
