"""What is told of a file or folder that was inspected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Share:
    """The tensors of one group that are stored in one precision."""

    group: str
    precision: str
    """`bf16`, `fp8` and so on, or the format's own name of a dtype that no weights have."""
    tensor_count: int
    byte_count: int
    """Scales included."""


@dataclass(frozen=True)
class ComponentReport:
    """One component of a file or folder."""

    component: str
    place: Path
    style: str
    """`diffusers`, `bfl` or `transformers`."""
    prefix: str
    shape: str
    """Its size in words; empty when it cannot be told."""
    variants: tuple[str, ...]
    """Known models that it can be of; equal tensors can be of several."""
    tensor_count: int
    byte_count: int
    shares: tuple[Share, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    problems: tuple[str, ...]
    """Why it cannot be loaded, beside what is missing and extra."""

    @property
    def is_usable(self) -> bool:
        return not (self.missing or self.extra or self.problems)


@dataclass(frozen=True)
class Report:
    """All that a file or folder holds."""

    place: Path
    components: tuple[ComponentReport, ...]
    metadata: Mapping[str, str]
    """Free text of the files' writers."""
    problems: tuple[str, ...]
    """What is wrong with the whole or with a component that could not be opened."""

    @property
    def is_usable(self) -> bool:
        return not self.problems and all(component.is_usable for component in self.components)
