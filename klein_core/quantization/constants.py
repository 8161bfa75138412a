"""What plain weights can be made into while they are loaded. Torch-free."""

from __future__ import annotations

NO_QUANTIZATION = "none"
FLOAT8 = "fp8"
INT8 = "int8"
QUANTIZATIONS = (NO_QUANTIZATION, FLOAT8, INT8)


FLOAT8_CHUNK_VALUES = 1 << 24
FLOAT4_CHUNK_VALUES = 1 << 22
"""Fewer, because finding blocks' scales and codes takes several copies in fp32."""


BLOCK = 16
"""Elements that share a block scale."""
TILE_ROWS = 128
TILE_COLUMNS = 4


def swizzled_shape(rows: int, columns: int) -> tuple[int, int]:
    """Returns the shape of swizzled scales: both sides rounded up to whole tiles."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // TILE_COLUMNS) * TILE_COLUMNS
