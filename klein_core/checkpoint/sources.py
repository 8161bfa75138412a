"""Where each parameter of a network comes from: rows of stored tensors, one below the other. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Piece(NamedTuple):
    """Rows of one stored tensor."""

    name: str
    """The tensor's name in the checkpoint, prefix included."""
    start: int = 0
    stop: int | None = None
    """Rows from `start` up to but not with `stop`; `None` is the tensor's end."""
    is_pointwise: bool = False
    """Whether it is stored as a 1×1 convolution (rows, columns, 1, 1) and needed as a matrix (rows, columns)."""

    def row_range(self, row_count: int) -> range:
        """Returns its rows of a tensor that has `row_count` of them."""
        return range(row_count)[self.start : self.stop]


Sources = Mapping[str, tuple[Piece, ...]]
"""Parameter name → the pieces that make it, in order; each parameter is on its own."""

NO_SOURCES: Sources = MappingProxyType({})

COMPANION_SUFFIXES = (
    ".weight_scale",
    ".weight_scale_2",
    ".input_scale",
    ".pre_quant_scale",
    ".comfy_quant",
)
"""What quantised files store beside `X.weight`: `X` and one of these. They describe it and are no parameters."""


def companions_of(name: str) -> dict[str, str]:
    """Returns suffix → the name that a quantised tensor `X.weight` would have a companion under."""
    base = name.removesuffix(".weight")
    return {suffix: base + suffix for suffix in COMPANION_SUFFIXES}


def is_companion(name: str) -> bool:
    """Whether a stored tensor only describes another one."""
    return name.endswith(COMPANION_SUFFIXES)
