"""What a denoiser tells of the adapters that it offers."""

from __future__ import annotations

from pathlib import Path

from klein_api.v1.stage_service_pb2 import AdapterDescription
from klein_core.denoiser.adapters.file import FileState
from klein_core.denoiser.adapters.layers import Layers
from klein_core.denoiser.adapters.reader import describe_adapter
from klein_core.errors import CheckpointError
from services.denoiser.adapter_folder import AdapterFolder


class AdapterCatalogue:
    """Describes adapters by the headers of their files, each read once for as long as it stays the same.

    Args:
        folder: what is offered.
        layers: what the model has.
    """

    def __init__(self, folder: AdapterFolder, layers: Layers) -> None:
        self._folder = folder
        self._layers = layers
        self._known: dict[str, tuple[FileState, AdapterDescription]] = {}

    def descriptions(self) -> list[AdapterDescription]:
        """Returns all adapters by name, the unusable ones with their problem. Slow: not for the event loop."""
        known = self._known
        # Replaced as a whole, so that callers on several threads do not meet half a table.
        self._known = {
            name: self._described(name, path, known.get(name))
            for name in self._folder.names()
            if (path := self._folder.path(name)) is not None
        }
        return [description for _, description in self._known.values()]

    def _described(
        self, name: str, path: Path, known: tuple[FileState, AdapterDescription] | None
    ) -> tuple[FileState, AdapterDescription]:
        state = FileState.of(path)
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
