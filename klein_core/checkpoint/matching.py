"""Matches a network's parameters with a checkpoint's tensors, strictly in both directions. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from klein_core.checkpoint.files import Checkpoint
from klein_core.checkpoint.layouts import Layout
from klein_core.checkpoint.sources import Piece, Sources
from klein_core.errors import refuse


@dataclass(frozen=True)
class Match:
    """Which tensors make which parameters, and what does not fit; names as the checkpoint has them."""

    plan: Mapping[str, tuple[Piece, ...]]
    """Parameter → the pieces that make it."""
    missing: tuple[str, ...]
    half: tuple[str, ...]
    """Parameters of which only some pieces are there, each with both lists."""
    extra: tuple[str, ...]
    """Tensors that no parameter needs and nothing explains."""

    def refuse(self, place: Path) -> None:
        """Raises CheckpointError with every name that does not fit."""
        problems = [
            ("missing:", self.missing),
            ("half of a fused group:", self.half),
            ("not part of this model:", self.extra),
        ]
        refuse(place, problems)


def match_tensors(
    targets: Iterable[str],
    checkpoint: Checkpoint,
    sources: Sources,
    layout: Layout | None = None,
    ignorable: Callable[[str], bool] = lambda name: False,
    is_companion: Callable[[str], bool] = lambda name: False,
) -> Match:
    """Finds the pieces of each parameter.

    Args:
        targets: all parameters and needed buffers of the network.
        sources: for parameters whose name in the checkpoint differs or that several pieces make; a checkpoint that
            has the whole under the parameter's own name does as well.
        layout: how the checkpoint prefixes its names, if it does.
        ignorable: tells names that are not needed, in the checkpoint or in the network.
        is_companion: tells tensors that only describe others.
    """
    prefix = layout.prefix if layout else ""
    stored = {name for name in checkpoint.files if layout is None or layout.owns(name)}
    available = {name for name in stored if not ignorable(name)}
    plan: dict[str, tuple[Piece, ...]] = {}
    missing: list[str] = []
    half: list[str] = []
    halves: set[str] = set()
    for target in targets:
        own = Piece(prefix + target)
        pieces = sources.get(target, (own,))
        names = list(dict.fromkeys(piece.name for piece in pieces))
        present = [name for name in names if name in available]
        if len(present) == len(names):
            plan[target] = pieces
        elif not present and own.name in available:
            plan[target] = (own,)
        elif present:
            half.append(f"{target} (has {', '.join(present)} of {', '.join(names)})")
            halves.update(present)
        elif not ignorable(target):
            missing.extend(names)
    used = {piece.name for pieces in plan.values() for piece in pieces}
    extra = [name for name in available - used - halves if not is_companion(name)]
    return Match(plan, tuple(missing), tuple(half), tuple(sorted(extra)))
