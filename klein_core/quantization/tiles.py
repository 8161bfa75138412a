"""Sizes of the blocks and tiles in which NVFP4 keeps its scales. Torch-free."""

from __future__ import annotations

BLOCK = 16
"""Elements that share a block scale."""
TILE_ROWS = 128
TILE_COLUMNS = 4


def swizzled_shape(rows: int, columns: int) -> tuple[int, int]:
    """Returns the shape of swizzled scales: both sides rounded up to whole tiles."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // TILE_COLUMNS) * TILE_COLUMNS
