"""What can go wrong in the model library.

KleinError
├── InvalidInput       the caller asked for something outside the limits; lists every violation
├── CheckpointError    the files are not what the configuration says; lists names
└── DeviceFault        the device is broken or out of memory; the process should be replaced
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
    """The field's name as the caller wrote it, for example `width_px`."""
    description: str
    """What is wrong and what would be right, limit included."""


class InvalidInput(KleinError):
    """The request breaks one or more limits; `violations` names them all."""

    def __init__(self, violations: Iterable[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in self.violations))

    @classmethod
    def of(cls, field: str, description: str) -> InvalidInput:
        """Makes the common case: a single violation."""
        return cls([Violation(field, description)])


class CheckpointError(KleinError):
    """A checkpoint is missing, incomplete, corrupt or of another shape than its configuration."""


class DeviceFault(KleinError):
    """The device failed in a way that later work would inherit."""


def raise_if_problems(path: Path, problems: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Raises CheckpointError with every non-empty list of names; each comes with what is wrong with them."""
    found = [f"{what} {listed(names)}" for what, names in problems if names]
    if found:
        raise CheckpointError(f"{path}: {'; '.join(found)}")


def listed(names: Iterable[str]) -> str:
    """Returns the first names in order and how many more there are; fit for a terminal whatever a file says."""
    ordered = sorted(names)
    rest = len(ordered) - _NAMES_SHOWN
    shown = (name if name.isprintable() else ascii(name) for name in ordered[:_NAMES_SHOWN])
    short = (name if len(name) <= _NAME_LENGTH_SHOWN else name[:_NAME_LENGTH_SHOWN] + "…" for name in shown)
    return ", ".join(short) + (f" and {rest} more" if rest > 0 else "")
