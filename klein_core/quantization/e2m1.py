"""Four-bit floats: one sign, two exponent, one mantissa bit; two in a byte, the even one in the high nibble."""

from __future__ import annotations

import torch
from torch import Tensor

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the codes 0 … 7; the codes 8 … 15 are the same below zero."""
LARGEST = MAGNITUDES[-1]


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


def nibbles_exchanged(packed: Tensor) -> Tensor:
    """Returns bytes with their halves exchanged: from low nibble first to high nibble first, and back."""
    return packed << 4 | packed >> 4
