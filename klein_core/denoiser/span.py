"""One image's share of a packed step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from klein_core.errors import InvalidInput, Violation
from klein_core.variants import TransformerConfig


@dataclass(frozen=True, eq=False)
class Span:
    """What the transformer sees of one image at one moment: text, the noisy target, clean references."""

    prompt_embedding: Tensor
    """(text tokens, joint attention channels). Padding rows are attended like any other."""
    latents: Tensor
    """(rows, columns, channels): the noisy target."""
    references: tuple[Tensor, ...] = ()
    """(rows, columns, channels) each, of any size, in the order the prompt counts them."""
    sigma: float = 1.0
    """Noise level of `latents` in 0…1."""

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the target, then of each reference."""
        return tuple((image.shape[0], image.shape[1]) for image in (self.latents, *self.references))

    @property
    def text_length(self) -> int:
        """Tokens of the prompt embedding."""
        return self.prompt_embedding.shape[0]

    @property
    def target_length(self) -> int:
        """Tokens of the target image."""
        return self.latents.shape[0] * self.latents.shape[1]

    @property
    def image_length(self) -> int:
        """Tokens of the target and all references."""
        return sum(rows * columns for rows, columns in self.grids)

    def check(self, config: TransformerConfig) -> None:
        """Compares shapes with the model's.

        Raises:
            InvalidInput: a tensor has the wrong number of axes or channels, or no tokens.
        """
        wanted = [("prompt_embedding", self.prompt_embedding, 2, config.joint_attention_dim)]
        wanted.append(("latents", self.latents, 3, config.in_channels))
        wanted += [(f"references[{i}]", r, 3, config.in_channels) for i, r in enumerate(self.references)]
        violations = [
            Violation(name, f"has shape {tuple(tensor.shape)}; {axes} non-empty axes, the last of {channels}")
            for name, tensor, axes, channels in wanted
            if tensor.ndim != axes or tensor.shape[-1] != channels or tensor.numel() == 0
        ]
        if violations:
            raise InvalidInput(violations)
