"""NVFP4 weights: 4-bit floats with a scale per block of 16 and a scale per matrix.

A float (e2m1) has one sign, two exponent and one mantissa bit; two share a byte, the even one in the high nibble.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from klein_core.quantization import fp8
from klein_core.quantization.constants import (
    BLOCK,
    FLOAT4_CHUNK_VALUES,
    TILE_COLUMNS,
    TILE_ROWS,
    swizzled_shape,
)
from klein_core.quantization.quantized_weight import (
    Capability,
    QuantizedWeight,
    multiplies_float4,
    stacked_input_scale,
    stacked_scale,
)

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the codes 0 … 7; the codes 8 … 15 are their negatives."""
LARGEST = MAGNITUDES[-1]
_BANDS, _BAND_ROWS = 4, 32
"""A tile's rows: 4 bands of 32, whose scales are interleaved."""
_COLUMN_ALIGNMENT = 32
_ROW_ALIGNMENT = 16
"""Multiples that a matmul of 4-bit floats requires of columns and rows."""


class Float4Weight(QuantizedWeight):
    """Weight of 4-bit floats: value = float · block scale · scale · smoothing of the column.

    Attributes:
        block_scales: bytes of e4m3 floats in tile order, padded to whole tiles.
        pairs: the two values of each byte, (256, 2) fp32.
        smoothing: fp32 (columns,), a factor of the layer's inputs. The writer divided the columns by it, so that a
            few large inputs cost the others less precision. `None` is 1.
    """

    block_scales: Tensor
    pairs: Tensor
    smoothing: Tensor | None

    def __init__(
        self,
        values: Tensor,
        block_scales: Tensor,
        scale: Tensor,
        input_scale: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        full_precision: bool = False,
    ) -> None:
        """`values` (rows, columns / 2) bytes; `block_scales` e4m3 (rows, columns / 16) in tile order, padded."""
        super().__init__(values, scale, input_scale, dtype=dtype, full_precision=full_precision)
        self.register_buffer("block_scales", block_scales.view(torch.uint8))
        self.register_buffer("smoothing", None)
        self.register_buffer("pairs", pair_table(values.device), persistent=False)

    @classmethod
    def from_linear(
        cls, values: Tensor, block_scales: Tensor, scale: Tensor, input_scale: Tensor | None = None
    ) -> Self:
        """Converts ModelOpt's layout: even elements in low nibbles, block scales (rows, columns / 16) row by row."""
        tiles = swizzled(block_scales.view(torch.uint8))
        return cls(swap_nibbles(values), tiles, scale, input_scale)

    @property
    def columns(self) -> int:
        return 2 * self.values.shape[1]

    def decoded(self, start: int, stop: int) -> Tensor:
        values = _in_blocks(decoded(self.values[start:stop], self.pairs))
        scales = self._block_scales(start, stop).view(torch.float8_e4m3fn).float()
        scales = scales.mul_(self._scale_of(start, stop))
        dequantized = values.mul_(scales[..., None]).flatten(1)
        return dequantized if self.smoothing is None else dequantized.mul_(self.smoothing)

    def cut(self, start: int, stop: int) -> Self:
        tiles = swizzled(self._block_scales(start, stop))
        scale = self._scale_of(start, stop)
        part = type(self)(
            self.values[start:stop],
            tiles,
            scale,
            self.input_scale,
            dtype=self.dtype,
            full_precision=self.full_precision,
        )
        part.smoothing = self.smoothing
        return part

    @classmethod
    def stacked(cls, parts: Sequence[Self]) -> Self:
        if any(part.smoothing is not None for part in parts):
            raise ValueError("weights with different smoothing cannot be stacked")
        values = torch.cat([part.values for part in parts])
        tiles = swizzled(torch.cat([part._block_scales(0, len(part.values)) for part in parts]))
        first = parts[0]
        return cls(
            values,
            tiles,
            stacked_scale(parts),
            stacked_input_scale(parts),
            dtype=first.dtype,
            full_precision=first.full_precision,
        )

    def fits(self, capability: Capability | None, start: int, stop: int) -> bool:
        aligned = not (
            self.columns % _COLUMN_ALIGNMENT or start % TILE_ROWS or (stop - start) % _ROW_ALIGNMENT
        )
        return aligned and multiplies_float4(capability)

    def product(self, tokens: Tensor, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Multiplies 4-bit inputs with 4-bit weights.

        Inputs are scaled by the file's static scale, or each token by its own: requests of a step stay independent.
        """
        parts = [self._quantized(rows) for rows in _split(tokens, tokens.shape[1])]
        packed, block_scales, input_scale = (torch.cat(part) for part in zip(*parts, strict=True))
        weight = self.values[start:stop].view(torch.float4_e2m1fn_x2).t()
        weight_tiles = self.block_scales[start : -(-stop // TILE_ROWS) * TILE_ROWS].view(torch.float8_e4m3fn)
        product = torch._scaled_mm(
            packed.view(torch.float4_e2m1fn_x2),
            weight,
            swizzled(block_scales).view(torch.float8_e4m3fn).flatten(),
            weight_tiles.flatten(),
            out_dtype=torch.bfloat16,
        )
        scale, out = self._scale_of(start, stop).t(), product if out is None else out
        # torch.mul computes in fp32 and rounds once.
        for target, rows, factor in zip(
            *(_split(each, stop - start) for each in (out, product, input_scale)), strict=True
        ):
            torch.mul(rows, factor * scale, out=target)
        return out

    def _quantized(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Smooths and quantizes tokens; returns codes, block scales and the tokens' scales (tokens, 1)."""
        exact = tokens.float() if self.smoothing is None else tokens.float() * self.smoothing
        if self.input_scale is not None:
            scale = self.input_scale[:, None].expand(len(exact), 1)
        else:
            largest = exact.abs().amax(dim=1, keepdim=True)
            scale = (largest / (fp8.LARGEST * LARGEST)).clamp(min=fp8.SMALLEST_SCALE)
        return *quantized_inputs(exact, scale), scale

    def _block_scales(self, start: int, stop: int) -> Tensor:
        """Returns bytes (stop − start, columns / 16), row by row."""
        return unswizzled(self.block_scales, self.columns // BLOCK, start, stop)


def quantized_inputs(tokens: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes fp32 tokens (count, inputs) with a scale (1, 1) or (count, 1).

    Returns:
        Packed bytes (count, inputs / 2), and the bytes of their block scales (count, inputs / 16).
    """
    blocks = _in_blocks(tokens)
    block_scales = fp8.float8(blocks.abs().amax(dim=-1) / LARGEST, scale)
    divisor = (block_scales.float() * scale)[..., None]
    scaled = torch.where(divisor > 0, blocks / divisor, 0)
    return encoded(scaled.flatten(1)), block_scales.view(torch.uint8)


def pair_table(device: torch.device | str) -> Tensor:
    """Returns the two values of each byte: (256, 2) fp32."""
    values = torch.tensor([*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)], device=device)
    high = values.repeat_interleave(len(values))
    return torch.stack([high, values.repeat(len(values))], dim=1)


def decoded(packed: Tensor, table: Tensor) -> Tensor:
    """Returns the values (rows, columns) of bytes (rows, columns / 2)."""
    return torch.embedding(table, packed.int()).flatten(1)


def encoded(values: Tensor) -> Tensor:
    """Returns the bytes (rows, columns / 2) nearest to values (rows, columns); ties go to the even code."""
    magnitude = values.abs().clamp(max=LARGEST)
    # The grid's spacing is ½ below 2, 1 below 4 and 2 above; torch rounds halves to even.
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    rounded = (magnitude / step).round() * step
    grid = torch.tensor(MAGNITUDES, device=values.device)
    codes = torch.bucketize(rounded, grid).to(torch.uint8) | (values < 0).to(torch.uint8) << 3
    return codes[:, 0::2] << 4 | codes[:, 1::2]


def swap_nibbles(packed: Tensor) -> Tensor:
    """Returns bytes with their nibbles swapped: from low nibble first to high nibble first, and back."""
    return packed << 4 | packed >> 4


def swizzled(scales: Tensor) -> Tensor:
    """Returns scales (rows, columns) in tile order, padded with zeros to whole tiles."""
    rows, columns = swizzled_shape(*scales.shape)
    padded = F.pad(scales, (0, columns - scales.shape[1], 0, rows - scales.shape[0]))
    tiles = padded.view(-1, _BANDS, _BAND_ROWS, columns // TILE_COLUMNS, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, columns)


def unswizzled(tiles: Tensor, columns: int, start: int, stop: int) -> Tensor:
    """Returns rows start … stop of scales (rows, columns) from `tiles`, where they are in tile order."""
    first = start // TILE_ROWS * TILE_ROWS
    needed = tiles[first : -(-stop // TILE_ROWS) * TILE_ROWS]
    grid = needed.reshape(-1, tiles.shape[1] // TILE_COLUMNS, _BAND_ROWS, _BANDS, TILE_COLUMNS)
    rows = grid.permute(0, 3, 2, 1, 4).reshape(needed.shape)
    return rows[start - first : stop - first, :columns]


def _split(rows: Tensor, width: int) -> tuple[Tensor, ...]:
    """Splits (rows, …) into chunks of at most `FLOAT4_CHUNK_VALUES` values, when each row has `width` values."""
    if torch.compiler.is_compiling():
        return (rows,)
    return torch.split(rows, max(FLOAT4_CHUNK_VALUES // width, 1))


def _in_blocks(values: Tensor) -> Tensor:
    """Returns (rows, columns / 16, 16)."""
    return values.reshape(len(values), -1, BLOCK)
