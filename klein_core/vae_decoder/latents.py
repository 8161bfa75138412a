"""The layout and scale of latents: 2×2 patches folded into channels, normalised per packed channel.

There is no scaling factor: a batch normalisation's running statistics, stored in the checkpoint, replace it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fold_patches(latents: Tensor, patch: tuple[int, int] = (2, 2)) -> Tensor:
    """Folds each patch of pixels into channels: (B, C, h, w) → (B, C·ph·pw, h/ph, w/pw).

    Packed channel `c·ph·pw + row·pw + column` is latent channel `c` at that row and column of the patch.
    """
    batch, channels, height, width = latents.shape
    rows, columns = height // patch[0], width // patch[1]
    cells = latents.reshape(batch, channels, rows, patch[0], columns, patch[1])
    return cells.permute(0, 1, 3, 5, 2, 4).reshape(batch, channels * patch[0] * patch[1], rows, columns)


def unfold_patches(packed: Tensor, patch: tuple[int, int] = (2, 2)) -> Tensor:
    """Undoes `fold_patches`: (B, C·ph·pw, r, c) → (B, C, r·ph, c·pw)."""
    batch, channels, rows, columns = packed.shape
    cells = packed.reshape(batch, channels // (patch[0] * patch[1]), patch[0], patch[1], rows, columns)
    return cells.permute(0, 1, 4, 2, 5, 3).reshape(batch, -1, rows * patch[0], columns * patch[1])


def normalise(packed: Tensor, statistics: nn.BatchNorm2d) -> Tensor:
    """Shifts and scales packed latents (B, C, r, c) to the unit statistics that the transformer works in."""
    mean, deviation = _mean_and_deviation(statistics, packed)
    return (packed - mean) / deviation


def denormalise(packed: Tensor, statistics: nn.BatchNorm2d) -> Tensor:
    """Undoes `normalise`: (B, C, r, c) → the same shape."""
    mean, deviation = _mean_and_deviation(statistics, packed)
    return packed * deviation + mean


def _mean_and_deviation(statistics: nn.BatchNorm2d, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, variance = statistics.running_mean, statistics.running_var
    if mean is None or variance is None:
        raise TypeError("latent statistics must track a running mean and variance")
    # The square root is taken in the statistics' own precision and only then cast, as the checkpoints expect.
    deviation = torch.sqrt(variance + statistics.eps)
    return mean.view(1, -1, 1, 1).to(like), deviation.view(1, -1, 1, 1).to(like)
