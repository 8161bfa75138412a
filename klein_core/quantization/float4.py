"""NVFP4: four-bit floats, an 8-bit scale for each sixteen of them, and one scale for a matrix.

In memory every matrix has the official files' layout, whatever its own was: the even element in the high nibble
and block scales in tile order, as Blackwell's matrix products read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from klein_core.quantization import e2m1, float8
from klein_core.quantization.devices import Capability, multiplies_float4
from klein_core.quantization.rooms import FLOAT4_VALUES
from klein_core.quantization.stored_weight import StoredWeight, stacked_input_scale, stacked_scale
from klein_core.quantization.swizzle import swizzled, unswizzled
from klein_core.quantization.tiles import BLOCK, TILE_ROWS

_COLUMN_ALIGNMENT = 32
_ROW_ALIGNMENT = 16


class Float4Weight(StoredWeight):
    """Value = float · block scale · scale, and · the column's smoothing where there is one.

    Attributes:
        smoothing: fp32 (columns,), which the layer's inputs are multiplied with before anything else; the writer
            divided the columns by it, so that a few loud inputs cost the others less. `None` is 1.
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
        """`values` (rows, columns / 2) bytes; `block_scales` swizzled e4m3 (rows, columns / 16), padded to tiles."""
        super().__init__(values, scale, input_scale, dtype=dtype, full_precision=full_precision)
        self.register_buffer("block_scales", block_scales.view(torch.uint8))
        self.register_buffer("smoothing", None)
        self.register_buffer("pairs", e2m1.pair_table(values.device), persistent=False)

    @classmethod
    def from_linear(
        cls, values: Tensor, block_scales: Tensor, scale: Tensor, input_scale: Tensor | None = None
    ) -> Self:
        """Takes ModelOpt's layout: the even element in the low nibble, block scales (rows, columns / 16) in order."""
        tiles = swizzled(block_scales.view(torch.uint8))
        return cls(e2m1.nibbles_exchanged(values), tiles, scale, input_scale)

    @property
    def columns(self) -> int:
        return 2 * self.values.shape[1]

    def decoded(self, start: int, stop: int) -> Tensor:
        values = _in_blocks(e2m1.decoded(self.values[start:stop], self.pairs))
        scales = self._block_scales(start, stop).view(torch.float8_e4m3fn).float()
        scales = scales.mul_(self._scale_of(start, stop))
        unfolded = values.mul_(scales[..., None]).flatten(1)
        return unfolded if self.smoothing is None else unfolded.mul_(self.smoothing)

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
            raise ValueError("the inputs of smoothed weights differ; such weights cannot be stacked")
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

        Inputs take the file's static scale, or else each token its own, so that requests in one step stay apart.
        """
        parts = [self._quantised(rows) for rows in _split(tokens, tokens.shape[1])]
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
        # In fp32 inside, rounded once.
        for target, rows, factor in zip(
            *(_split(each, stop - start) for each in (out, product, input_scale)), strict=True
        ):
            torch.mul(rows, factor * scale, out=target)
        return out

    def _quantised(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what `quantised_inputs` does of some tokens, and their scales (tokens, 1)."""
        exact = tokens.float() if self.smoothing is None else tokens.float() * self.smoothing
        scale = self._input_scale(exact).expand(len(exact), 1)
        return *quantised_inputs(exact, scale), scale

    def _input_scale(self, tokens: Tensor) -> Tensor:
        """Returns (1, 1) or (tokens, 1)."""
        if self.input_scale is not None:
            return self.input_scale[:, None]
        largest = tokens.abs().amax(dim=1, keepdim=True)
        return (largest / (float8.LARGEST * e2m1.LARGEST)).clamp(min=float8.SMALLEST_SCALE)

    def _block_scales(self, start: int, stop: int) -> Tensor:
        """Returns bytes (stop − start, columns / 16), in order."""
        return unswizzled(self.block_scales, self.columns // BLOCK, start, stop)


def quantised_inputs(tokens: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises fp32 tokens (count, inputs) under a scale (1, 1) or (count, 1).

    Returns:
        Packed bytes (count, inputs / 2), and the bytes of their block scales (count, inputs / 16).
    """
    blocks = _in_blocks(tokens)
    block_scales = float8.float8(blocks.abs().amax(dim=-1) / e2m1.LARGEST, scale)
    divisor = (block_scales.float() * scale)[..., None]
    scaled = torch.where(divisor > 0, blocks / divisor, 0)
    return e2m1.encoded(scaled.flatten(1)), block_scales.view(torch.uint8)


def _split(rows: Tensor, width: int) -> tuple[Tensor, ...]:
    """Cuts (rows, …) into as many rows at a time as have room when each has `width` values."""
    if torch.compiler.is_compiling():
        return (rows,)
    return torch.split(rows, max(FLOAT4_VALUES // width, 1))


def _in_blocks(values: Tensor) -> Tensor:
    """Returns (rows, columns / 16, 16)."""
    return values.reshape(len(values), -1, BLOCK)
