"""One image's share of a packed step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from klein_core.denoiser.adapters.adapter import ScaledAdapter
from klein_core.denoiser.reference_cache import ReferenceCache, cache_shape
from klein_core.errors import InvalidInput, Violation
from klein_core.variants import TransformerConfig

_Wanted = tuple[str, Tensor, int, int]
"""Name, tensor, axes, channels."""


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
    reference_cache: ReferenceCache | None = None
    """In place of `references`, for models that take them so."""
    adapters: tuple[ScaledAdapter, ...] = ()
    """What is added to the network's products for this image alone."""

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

    @property
    def cached_length(self) -> int:
        """Tokens of the references that are cached."""
        return 0 if self.reference_cache is None else self.reference_cache.token_count

    def check(self, config: TransformerConfig) -> None:
        """Compares shapes with the model's.

        Raises:
            InvalidInput: a tensor has the wrong number of axes or channels, or no tokens; or references are
                there twice, as tokens and as a cache.
        """
        wanted = [("prompt_embedding", self.prompt_embedding, 2, config.joint_attention_dim)]
        wanted.append(("latents", self.latents, 3, config.in_channels))
        violations = list(_shape_violations([*wanted, *_wanted_references(self.references, config)]))
        violations += self._cache_violations(config)
        if violations:
            raise InvalidInput(violations)

    def _cache_violations(self, config: TransformerConfig) -> list[Violation]:
        if self.reference_cache is None:
            return []
        violations = []
        shape, wanted = self.reference_cache.keys_values.shape, cache_shape(config, self.cached_length)
        if shape != wanted:
            violations.append(
                Violation("reference_cache", f"has shape {tuple(shape)}; this model's is {wanted}")
            )
        if self.references:
            violations.append(Violation("references", "must be empty beside a reference_cache"))
        return violations


def check_references(references: Sequence[Tensor], config: TransformerConfig) -> None:
    """Compares references with what the model takes.

    Raises:
        InvalidInput: there are none, or a tensor has the wrong number of axes or channels, or no tokens.
    """
    if not references:
        raise InvalidInput.of("references", "are none; at least 1")
    violations = list(_shape_violations(_wanted_references(references, config)))
    if violations:
        raise InvalidInput(violations)


def _wanted_references(references: Sequence[Tensor], config: TransformerConfig) -> list[_Wanted]:
    return [(f"references[{i}]", r, 3, config.in_channels) for i, r in enumerate(references)]


def _shape_violations(wanted: Sequence[_Wanted]) -> Iterator[Violation]:
    for name, tensor, axes, channels in wanted:
        if tensor.ndim != axes or tensor.shape[-1] != channels or tensor.numel() == 0:
            yield Violation(
                name, f"has shape {tuple(tensor.shape)}; {axes} non-empty axes, the last of {channels}"
            )
