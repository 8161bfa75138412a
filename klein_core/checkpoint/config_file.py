"""One JSON configuration file; every value that is missing or wrong is an error that names file and key. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klein_core.errors import CheckpointError
from klein_core.variants import read_json


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
        return CheckpointError(f"{self.path}: {key} is {value!r}; {needed}")

    def require_only(self, supported: Mapping[str, Any]) -> None:
        """Refuses keys that are present with another value than the one that is supported."""
        for key, value in supported.items():
            if key in self.values and self.values[key] != value:
                raise self.refuse(key, self.values[key], f"only {value!r} is supported")

    def require_class(self, supported: Collection[str], key: str = "_class_name") -> None:
        """Refuses the name of a class that is not supported; no name is as good as a right one."""
        check_class(self.path, key, self.values.get(key), supported, optional=True)

    def integer(self, key: str, default: int | None = None) -> int:
        """Returns a whole number above 0."""
        return self._integer(key, self.values.get(key, default))

    def integers(self, key: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Returns whole numbers above 0, at least one."""
        value = self.values.get(key, default)
        if not isinstance(value, list | tuple) or not value:
            raise self.refuse(key, value, "it must be a list of whole numbers")
        return tuple(self._integer(key, item) for item in value)

    def number(self, key: str, default: float) -> float:
        """Returns a number above 0."""
        value = self.values.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.refuse(key, value, "it must be a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Returns true or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, value, "it must be true or false")
        return value

    def _integer(self, key: str, value: object) -> int:
        if value is None:
            raise CheckpointError(f"{self.path}: {key} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refuse(key, value, "it must be a whole number above 0")
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
