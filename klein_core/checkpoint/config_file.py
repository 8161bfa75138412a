"""One JSON configuration file; every value that is missing or wrong is an error that names file and key. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klein_core.errors import CheckpointError
from klein_core.variants import read_json

LARGEST_INTEGER = 1 << 20
"""Of any count or width: beyond every model's, and too small to exhaust memory before tensors are compared."""
LARGEST_LAYER_COUNT = 1024
"""Of anything that a network is built of one by one."""
LARGEST_NUMBER = 1e12
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class ConfigFile:
    """A file and what stands in it."""

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        """Reads a file.

        Raises:
            CheckpointError: it is missing, or no JSON object. All methods raise this for a value of theirs.
        """
        return cls(path, read_json(path))

    def refuse(self, key: str, value: object, needed: str) -> CheckpointError:
        """Returns the error for a value; `needed` goes after a semicolon."""
        shown = repr(value)[:_SHOWN_CHARACTERS]
        return CheckpointError(f"{self.path}: {key} is {shown}; {needed}")

    def require_only(self, supported: Mapping[str, Any]) -> None:
        """Refuses keys that are present with another value than the one that is supported."""
        for key, value in supported.items():
            if key in self.values and self.values[key] != value:
                raise self.refuse(key, self.values[key], f"only {value!r} is supported")

    def require_class(self, supported: Collection[str], key: str = "_class_name") -> None:
        """Refuses the name of a class that is not supported; no name is as good as a right one."""
        check_class(self.path, key, self.values.get(key), supported, optional=True)

    def integer(self, key: str, default: int | None = None, largest: int = LARGEST_INTEGER) -> int:
        """Returns a whole number in 1 … largest."""
        return self._integer(key, self.values.get(key, default), largest)

    def integers(self, key: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Returns whole numbers in 1 … `LARGEST_INTEGER`, at least one and a bounded number of them."""
        value = self.values.get(key, default)
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= LARGEST_LAYER_COUNT:
            raise self.refuse(key, value, f"it must be a list of 1 to {LARGEST_LAYER_COUNT} whole numbers")
        return tuple(self._integer(key, item, LARGEST_INTEGER) for item in value)

    def number(self, key: str, default: float) -> float:
        """Returns a number above 0 and up to `LARGEST_NUMBER`."""
        value = self.values.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= LARGEST_NUMBER:
            raise self.refuse(key, value, f"it must be a number above 0 and up to {LARGEST_NUMBER:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Returns true or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, value, "it must be true or false")
        return value

    def _integer(self, key: str, value: object, largest: int) -> int:
        if value is None:
            raise CheckpointError(f"{self.path}: {key} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
            raise self.refuse(key, value, f"it must be a whole number in 1 … {largest}")
        return value


def check_class(
    path: Path, key: str, name: object, supported: Collection[str], *, optional: bool = False
) -> None:
    """Refuses a class that is not supported.

    Raises:
        CheckpointError: naming those that are.
    """
    if name not in supported and not (optional and name is None):
        raise CheckpointError(f"{path}: {key} is {name}; only {' or '.join(supported)} is supported")
