"""Precisions of weights, and the bytes of a matrix in each. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from klein_core.quantization.constants import (
    FLOAT4_CHUNK_VALUES,
    FLOAT8,
    FLOAT8_CHUNK_VALUES,
    INT8,
    NVFP4_TILED,
)

_SCALE_BYTES = 4
_NVFP4_BLOCK = 16
_NVFP4_TILE_ROWS, _NVFP4_TILE_COLUMNS = 128, 4


@dataclass(frozen=True)
class Precision:
    """Format of the weights of one network, and the width of its activations."""

    name: str
    value_bytes: int
    """Bytes of one activation, and of one weight that is never quantized."""
    matrix_bytes: Callable[[int, int], int]
    """(rows, columns) of a quantizable matrix → its bytes."""
    is_quantized: bool = False
    """Whether a product may need a dequantized copy of its matrix."""
    input_bytes: Callable[[int], int] = lambda values: 0
    """Values of a product's input → peak bytes of quantizing them, on a device that multiplies quantized matrices."""


def _nvfp4_bytes(rows: int, columns: int) -> int:
    block_columns = -(-columns // _NVFP4_BLOCK)
    tiles = -(-rows // _NVFP4_TILE_ROWS) * -(-block_columns // _NVFP4_TILE_COLUMNS)
    return rows * columns // 2 + tiles * _NVFP4_TILE_ROWS * _NVFP4_TILE_COLUMNS + _SCALE_BYTES


def _byte_and_row_scales(rows: int, columns: int) -> int:
    return rows * columns + rows * _SCALE_BYTES


def _float8_inputs(values: int) -> int:
    """Returns one byte per value, and two fp32 copies of one chunk."""
    return values + 8 * min(values, FLOAT8_CHUNK_VALUES)


def _nvfp4_inputs(values: int) -> int:
    """Returns half a byte and a share of the scale, twice while chunks are joined, and 29 bytes a value of a chunk."""
    return values * 9 // 8 + 29 * min(values, FLOAT4_CHUNK_VALUES)


PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        each.name: each
        for each in (
            Precision("fp32", 4, lambda rows, columns: 4 * rows * columns),
            Precision("bf16", 2, lambda rows, columns: 2 * rows * columns),
            Precision(FLOAT8, 2, _byte_and_row_scales, is_quantized=True, input_bytes=_float8_inputs),
            Precision(INT8, 2, _byte_and_row_scales, is_quantized=True),
            Precision(NVFP4_TILED, 2, _nvfp4_bytes, is_quantized=True, input_bytes=_nvfp4_inputs),
        )
    }
)
"""Every precision by its name, from the largest weights to the smallest."""
