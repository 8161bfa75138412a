"""Errors of the model library.

KleinError
├── InvalidInput       a request exceeds one or more limits; lists every violation
├── CheckpointError    files are missing, corrupt or do not fit the configuration; lists names
└── DeviceFault        the device failed; the process should be replaced
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_NAMES_SHOWN = 8
_NAME_LENGTH_SHOWN = 200


class KleinError(Exception):
    """Base of every error that this library raises on purpose."""


@dataclass(frozen=True)
class Violation:
    """One field that is outside its limits."""

    field: str
    """The field's name in the request, for example `width_px`."""
    description: str
    """What is wrong and what is allowed, limit included."""


class InvalidInput(KleinError):
    """A request exceeds one or more limits; `violations` lists them all."""

    def __init__(self, violations: Iterable[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in self.violations))

    @classmethod
    def of(cls, field: str, description: str) -> InvalidInput:
        """Returns the error for a single violation."""
        return cls([Violation(field, description)])


class CheckpointError(KleinError):
    """A checkpoint is missing, incomplete, corrupt or does not fit its configuration."""


class DeviceFault(KleinError):
    """The device failed in a way that affects later work."""


def raise_if_problems(path: Path, problems: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Raises CheckpointError with every problem that has names; does nothing when none has.

    Args:
        path: the file or folder, for the message.
        problems: pairs of what is wrong and the names that it is wrong with.
    """
    found = [f"{what} {listed(names)}" for what, names in problems if names]
    if found:
        raise CheckpointError(f"{path}: {'; '.join(found)}")


def listed(names: Iterable[str]) -> str:
    """Joins the first names, sorted, escaped and shortened, plus "and N more"."""
    ordered = sorted(names)
    rest = len(ordered) - _NAMES_SHOWN
    shown = (name if name.isprintable() else ascii(name) for name in ordered[:_NAMES_SHOWN])
    short = (name if len(name) <= _NAME_LENGTH_SHOWN else name[:_NAME_LENGTH_SHOWN] + "…" for name in shown)
    return ", ".join(short) + (f" and {rest} more" if rest > 0 else "")
