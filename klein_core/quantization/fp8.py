"""8-bit weights, floats and integers: one scale for a matrix, or one for each of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from klein_core.quantization.constants import FLOAT8_CHUNK_VALUES
from klein_core.quantization.quantized_weight import (
    Capability,
    QuantizedWeight,
    multiplies_float8,
    stacked_input_scale,
    stacked_scale,
)

LARGEST = float(torch.finfo(torch.float8_e4m3fn).max)
INT8_LARGEST = 127
SMALLEST_SCALE = 1e-12
"""Scale of a row of zeros, so that nothing is divided by zero."""
_ALIGNMENT = 16
"""Rows and columns of a matmul of 8-bit floats must be multiples of this."""


class Float8Weight(QuantizedWeight):
    """Weight of 8-bit floats: value = float · scale."""

    def __init__(
        self,
        values: Tensor,
        scale: Tensor,
        input_scale: Tensor | None = None,
        *,
        element: torch.dtype = torch.float8_e4m3fn,
        dtype: torch.dtype = torch.bfloat16,
        full_precision: bool = False,
    ) -> None:
        """`values` (rows, columns) are floats of dtype `element`, or their bytes."""
        # As bytes, so that casting the model to another dtype does not cast the floats.
        super().__init__(
            values.view(torch.uint8), scale, input_scale, dtype=dtype, full_precision=full_precision
        )
        self.element = element

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        """Quantizes a matrix (rows, columns), each row with its own scale; computed in fp32."""
        exact = weight.float()
        scale = (exact.abs().amax(dim=1) / LARGEST).clamp(min=SMALLEST_SCALE)
        return cls(float8(exact, scale[:, None]), scale, dtype=weight.dtype)

    @property
    def columns(self) -> int:
        return self.values.shape[1]

    def decoded(self, start: int, stop: int) -> Tensor:
        codes, scale = self.values[start:stop], self._scale_of(start, stop)
        if codes.device.type != "cpu":
            return codes.view(self.element).float().mul_(scale)
        floats, factor = _via_halves(codes, self.element)
        return floats.mul_(scale * factor)

    def cut(self, start: int, stop: int) -> Self:
        scale = self._scale_of(start, stop)
        return type(self)(
            self.values[start:stop],
            scale,
            self.input_scale,
            element=self.element,
            dtype=self.dtype,
            full_precision=self.full_precision,
        )

    @classmethod
    def stacked(cls, parts: Sequence[Self]) -> Self:
        values = torch.cat([part.values for part in parts])
        first = parts[0]
        return cls(
            values,
            stacked_scale(parts),
            stacked_input_scale(parts),
            element=first.element,
            dtype=first.dtype,
            full_precision=first.full_precision,
        )

    def fits(self, capability: Capability | None, start: int, stop: int) -> bool:
        aligned = not (self.columns % _ALIGNMENT or start % _ALIGNMENT or (stop - start) % _ALIGNMENT)
        return aligned and self.element == torch.float8_e4m3fn and multiplies_float8(capability)

    def product(self, tokens: Tensor, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Multiplies 8-bit inputs with 8-bit weights.

        Inputs are scaled by the file's static scale, or each token by its own: one scale for all tokens would let a
        request change the results of another.
        """
        scale = self.scale if len(self.scale) == 1 else self.scale[start:stop]
        if self.input_scale is not None and len(scale) == 1:
            input_scale = self.input_scale
        else:
            if self.input_scale is not None:
                input_scale = self.input_scale.expand(len(tokens), 1).contiguous()
            else:
                # The infinity norm is the largest magnitude; it needs no copy of the tokens, unlike abs().
                largest = torch.linalg.vector_norm(tokens, ord=torch.inf, dim=1, keepdim=True).float()
                input_scale = (largest / LARGEST).clamp(min=SMALLEST_SCALE)
            scale = scale.expand(stop - start)[None].contiguous()
        inputs = float8(tokens, input_scale)
        weight = self.values[start:stop].view(self.element).t()
        return torch._scaled_mm(
            inputs, weight, input_scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True, out=out
        )


class Int8Weight(QuantizedWeight):
    """Weight of 8-bit integers: value = integer · scale."""

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        """Quantizes a matrix (rows, columns), each row with its own scale; computed in fp32."""
        exact = weight.float()
        scale = (exact.abs().amax(dim=1) / INT8_LARGEST).clamp(min=SMALLEST_SCALE)
        return cls((exact / scale[:, None]).round().to(torch.int8), scale, dtype=weight.dtype)

    @property
    def columns(self) -> int:
        return self.values.shape[1]

    def decoded(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop].float().mul_(self._scale_of(start, stop))

    def cut(self, start: int, stop: int) -> Self:
        return type(self)(
            self.values[start:stop],
            self._scale_of(start, stop),
            dtype=self.dtype,
            full_precision=self.full_precision,
        )

    @classmethod
    def stacked(cls, parts: Sequence[Self]) -> Self:
        values = torch.cat([part.values for part in parts])
        return cls(values, stacked_scale(parts), dtype=parts[0].dtype)


def is_finite(codes: Tensor, element: torch.dtype) -> bool:
    """Whether none of the floats is infinite or NaN."""
    first_special = 0x7F if element == torch.float8_e4m3fn else 0x7C
    return int((codes.view(torch.uint8) & 0x7F).amax()) < first_special


def _via_halves(codes: Tensor, element: torch.dtype) -> tuple[Tensor, float]:
    """Returns fp32 values and the factor to multiply them with.

    torch converts 8-bit floats on the CPU one by one. Shifted into halves, which the CPU converts in hardware, they
    take a quarter of the time. Halves have e5m2's exponent bias, and 8 more than e4m3's: both factors are exact.
    """
    wide = codes.view(torch.int8).to(torch.int16)
    if element == torch.float8_e5m2:
        return (wide << 8).view(torch.float16).float(), 1.0
    # Widening extended the sign into the bit below it, which is the exponent's highest.
    return (wide << 7 & ~0x4000).view(torch.float16).float(), 256.0


def float8(values: Tensor, scale: Tensor) -> Tensor:
    """Returns values / scale as e4m3 floats, clipped to their range.

    Computed in fp32, a bounded number of rows at a time.

    Args:
        values: (rows, …).
        scale: fp32, one for all rows (1, …) or one per row (rows, …).
    """
    if torch.compiler.is_compiling():
        return _quotient(values, scale).to(torch.float8_e4m3fn)
    floats = torch.empty(values.shape, dtype=torch.float8_e4m3fn, device=values.device)
    count = max(FLOAT8_CHUNK_VALUES // max(values[:1].numel(), 1), 1)
    for start in range(0, len(values), count):
        rows = slice(start, start + count)
        floats[rows] = _quotient(values[rows], scale if len(scale) == 1 else scale[rows])
    return floats


def _quotient(values: Tensor, scale: Tensor) -> Tensor:
    return (values / scale).clamp_(-LARGEST, LARGEST)
