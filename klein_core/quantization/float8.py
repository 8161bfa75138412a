"""Eight-bit floats: one scale for a matrix, or one for each of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from klein_core.quantization.devices import Capability, multiplies_float8
from klein_core.quantization.stored_weight import StoredWeight, stacked_input_scale, stacked_scale

LARGEST = float(torch.finfo(torch.float8_e4m3fn).max)
SMALLEST_SCALE = 1e-12
"""Scale of a row of zeros, which nothing can be divided by."""
_ALIGNMENT = 16
"""Rows and columns of a product of 8-bit floats come in multiples of this."""


class Float8Weight(StoredWeight):
    """Value = float · scale."""

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
        """`values` are the floats' bytes (rows, columns), or the floats themselves, of type `element`."""
        # As bytes, so that casting a model to another type does not cast what is stored.
        super().__init__(
            values.view(torch.uint8), scale, input_scale, dtype=dtype, full_precision=full_precision
        )
        self.element = element

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        """Quantises a matrix, each row to a scale of its own; computed in fp32."""
        exact = weight.float()
        scale = (exact.abs().amax(dim=1) / LARGEST).clamp(min=SMALLEST_SCALE)
        return cls(float8(exact, scale[:, None]), scale, dtype=weight.dtype)

    @property
    def columns(self) -> int:
        return self.values.shape[1]

    def decoded(self, start: int, stop: int) -> Tensor:
        floats = self.values[start:stop].view(self.element)
        return floats.float().mul_(self._scale_of(start, stop))

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

        Inputs take the file's static scale, or else each token its own: a scale for all of them would let one
        request's tokens change another's.
        """
        scale = self.scale if len(self.scale) == 1 else self.scale[start:stop]
        if self.input_scale is not None and len(scale) == 1:
            inputs, input_scale = float8(tokens.float(), self.input_scale), self.input_scale
        else:
            input_scale = self._token_scale(tokens)
            inputs = float8(tokens.float(), input_scale)
            scale = scale.expand(stop - start)[None].contiguous()
        weight = self.values[start:stop].view(self.element).t()
        return torch._scaled_mm(
            inputs, weight, input_scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True, out=out
        )

    def _token_scale(self, tokens: Tensor) -> Tensor:
        """Returns (tokens, 1)."""
        if self.input_scale is not None:
            return self.input_scale.expand(len(tokens), 1).contiguous()
        return (tokens.float().abs().amax(dim=1, keepdim=True) / LARGEST).clamp(min=SMALLEST_SCALE)


def float8(values: Tensor, scale: Tensor) -> Tensor:
    """Returns values / scale as e4m3 floats; what is beyond their range becomes the largest."""
    return (values / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
