"""The order in which NVIDIA's matrix products read block scales: tiles of 128 rows by 4 columns.

Tiles lie row by row. Inside its 512 bytes a scale (row r, column c) is at
(r mod 32) · 16 + (r mod 128) // 32 · 4 + c mod 4. Source: cuBLAS, layout of scaling factors for 1-D blocks.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from klein_core.quantization.tiles import TILE_COLUMNS, TILE_ROWS, swizzled_shape

_BANDS, _BAND_ROWS = 4, 32


def swizzled(scales: Tensor) -> Tensor:
    """Returns scales (rows, columns) in tile order, padded with zeros to whole tiles."""
    rows, columns = swizzled_shape(*scales.shape)
    padded = F.pad(scales, (0, columns - scales.shape[1], 0, rows - scales.shape[0]))
    tiles = padded.view(-1, _BANDS, _BAND_ROWS, columns // TILE_COLUMNS, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, columns)


def unswizzled(tiles: Tensor, columns: int, start: int, stop: int) -> Tensor:
    """Returns rows start … stop of the scales (rows, columns) that `tiles` holds in tile order."""
    first = start // TILE_ROWS * TILE_ROWS
    needed = tiles[first : -(-stop // TILE_ROWS) * TILE_ROWS]
    grid = needed.reshape(-1, tiles.shape[1] // TILE_COLUMNS, _BAND_ROWS, _BANDS, TILE_COLUMNS)
    rows = grid.permute(0, 3, 2, 1, 4).reshape(needed.shape)
    return rows[start - first : stop - first, :columns]
