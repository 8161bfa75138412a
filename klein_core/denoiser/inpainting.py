"""Inpainting: the part of an initial image that a trajectory keeps while the masked rest is made anew.

The initial image is noised to the level of the first step that `strength` leaves. After every step the tokens outside
the mask are set back to it at the new level. Source of the formulas: `Flux2KleinInpaintPipeline` of diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from klein_core.errors import InvalidInput


def first_step(step_count: int, strength: float) -> int:
    """Returns the index of the first step that is run: of n steps, the last n · strength, rounded up.

    Raises:
        InvalidInput: the strength is outside 0…1, or so small that no step is left.
    """
    if not 0 < strength <= 1:
        raise InvalidInput.of("strength", f"is {strength:g}; above 0 and up to 1")
    first = int(max(step_count - min(step_count * strength, step_count), 0))
    if first == step_count:
        raise InvalidInput.of("strength", f"is {strength:g}; of {step_count} steps none would be left")
    return first


@dataclass(frozen=True)
class Inpainting:
    """An initial image as a trajectory needs it. All tensors have one dtype and device."""

    latents: Tensor
    """(rows, columns, channels), clean."""
    mask: Tensor
    """(rows, columns, 1): 1 is made anew, 0 is kept, between them both are mixed."""
    noise: Tensor
    """(rows, columns, channels), that of the trajectory's seed."""

    def __post_init__(self) -> None:
        rows_and_columns = self.latents.shape[:2]
        if self.noise.shape != self.latents.shape:
            raise InvalidInput.of(
                "noise", f"has shape {tuple(self.noise.shape)}; {tuple(self.latents.shape)}"
            )
        if self.mask.shape != (*rows_and_columns, 1):
            raise InvalidInput.of("mask", f"has shape {tuple(self.mask.shape)}; {(*rows_and_columns, 1)}")

    def noised(self, sigma: float) -> Tensor:
        """Returns σ · noise + (1 − σ) · latents, with σ rounded to their dtype as diffusers rounds it."""
        level = torch.tensor(sigma, dtype=self.latents.dtype, device=self.latents.device)
        return level * self.noise + (1.0 - level) * self.latents

    def blended(self, latents: Tensor, sigma: float) -> Tensor:
        """Returns `latents` inside the mask and the initial image at noise level `sigma` outside."""
        return (1 - self.mask) * self.noised(sigma) + self.mask * latents
