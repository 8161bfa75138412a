"""Eight-bit whole numbers: weights only, one scale a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from klein_core.quantization.stored_weight import StoredWeight, stacked_scale

LARGEST = 127
SMALLEST_SCALE = 1e-12


class Int8Weight(StoredWeight):
    """Value = number · scale."""

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        """Quantises a matrix, each row to a scale of its own; computed in fp32."""
        exact = weight.float()
        scale = (exact.abs().amax(dim=1) / LARGEST).clamp(min=SMALLEST_SCALE)
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
