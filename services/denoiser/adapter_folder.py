"""The folder of adapters that requests may name. Torch-free."""

from __future__ import annotations

from pathlib import Path

from klein_core.checkpoint.files import is_inside
from klein_core.params import ADAPTER_NAME

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
