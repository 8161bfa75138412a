"""Everything that is wrong with an adapter's file, told at once."""

from __future__ import annotations

from pathlib import Path

from klein_core.errors import refuse


class Problems:
    """Names by what is wrong with them."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, what: str, name: str) -> None:
        """Notes that `name` is `what`."""
        self._names.setdefault(what, []).append(name)

    def raise_if_any(self, file: Path) -> None:
        """Raises CheckpointError when something was noted; folders are nobody's business and not told."""
        refuse(Path(file.name), self._names.items())
