"""Which noise levels a trajectory passes: a straight line, shifted by how many tokens the image has."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from klein_core.denoiser.adapters.adapter import ScaledAdapter
from klein_core.denoiser.packing import Span
from klein_core.denoiser.reference_cache import ReferenceCache
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.errors import InvalidInput

LARGE_IMAGE_TOKENS = 4300
"""Above this many target tokens the shift no longer depends on the step count and drops sharply."""


def empirical_mu(token_count: int, step_count: int) -> float:
    """Returns the logarithm of the shift for `token_count` target tokens (references do not count).

    Two lines fitted at 10 and 200 steps, interpolated in the step count. Source of the constants:
    `compute_empirical_mu` in black-forest-labs/flux2 and diffusers.
    """
    many_steps = 0.00016927 * token_count + 0.45666666
    if token_count > LARGE_IMAGE_TOKENS:
        return many_steps
    few_steps = 8.73809524e-05 * token_count + 1.89833333
    slope = (many_steps - few_steps) / 190.0
    return slope * step_count + (many_steps - 200.0 * slope)


def sigmas(token_count: int, step_count: int) -> list[float]:
    """Returns `step_count` + 1 noise levels from 1 down to 0; each is exactly a float32.

    Raises:
        InvalidInput: no tokens or no steps.
    """
    if token_count < 1:
        raise InvalidInput.of("token_count", f"is {token_count}; at least 1")
    if step_count < 1:
        raise InvalidInput.of("step_count", f"is {step_count}; at least 1")
    line = np.linspace(1.0, 1 / step_count, step_count).astype(np.float32)
    shift = math.exp(empirical_mu(token_count, step_count))
    shifted = (shift / (shift + (1 / line - 1))).astype(np.float32)
    return [*shifted.tolist(), 0.0]


def initial_noise(
    seed: int,
    rows: int,
    columns: int,
    channels: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Returns (rows, columns, channels) of standard normal noise.

    It is drawn on the CPU, so that a seed means the same on every device, and like diffusers in `dtype`
    itself and channels first: drawn channels last, the same seed is another picture.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn((1, channels, rows, columns), generator=generator, dtype=dtype)
    return noise[0].permute(1, 2, 0).contiguous().to(device)


class Trajectory:
    """One image on its way from noise to data. Images of one request share its tensors."""

    def __init__(
        self,
        *,
        latents: Tensor,
        step_count: int,
        step_index: int = 0,
        prompt_embedding: Tensor,
        negative_prompt_embedding: Tensor | None = None,
        guidance_scale: float = 1.0,
        references: tuple[Tensor, ...] = (),
        reference_cache: ReferenceCache | None = None,
        adapters: Sequence[ScaledAdapter] = (),
    ) -> None:
        """Starts, or goes on, with `latents` as they are before step `step_index`.

        Args:
            latents: (rows, columns, channels); pure noise where `step_index` is 0.
            step_count: steps from noise to data, those already taken included.
            step_index: steps already taken.
            prompt_embedding: (text tokens, joint attention channels).
            negative_prompt_embedding: the same; needed when `guidance_scale` is above 1, else not used.
            guidance_scale: 1 or less is no guidance and one span a step, more is two.
            references: clean latents, (rows, columns, channels) each.
            reference_cache: in place of `references`, for models that take them so; it may also be set before the
                first step.
            adapters: added to the network's products, in guidance's both spans; a scale of 0 is none.

        Raises:
            InvalidInput: latents have no three axes, the step index is outside 0…step_count, or guidance
                lacks its negative prompt.
        """
        if latents.ndim != 3:
            raise InvalidInput.of("latents", f"has shape {tuple(latents.shape)}; rows, columns, channels")
        self.sigmas = sigmas(latents.shape[0] * latents.shape[1], step_count)
        if not 0 <= step_index <= step_count:
            raise InvalidInput.of("step_index", f"is {step_index}; 0 to {step_count}")
        self.prompt_embeddings = _prompt_embeddings(
            prompt_embedding, negative_prompt_embedding, guidance_scale
        )
        self.guidance_scale = guidance_scale
        self.references = references
        self.reference_cache = reference_cache
        self.adapters = tuple(wanted for wanted in adapters if wanted.scale)
        self.latents = latents
        self.step_count = step_count
        self.step_index = step_index
        self._velocity: Tensor | None = None

    @classmethod
    def from_noise(
        cls,
        *,
        seed: int,
        rows: int,
        columns: int,
        channels: int,
        step_count: int,
        prompt_embedding: Tensor,
        negative_prompt_embedding: Tensor | None = None,
        guidance_scale: float = 1.0,
        references: tuple[Tensor, ...] = (),
        reference_cache: ReferenceCache | None = None,
        adapters: Sequence[ScaledAdapter] = (),
    ) -> Trajectory:
        """Starts from `initial_noise` in the prompt embedding's dtype, on its device."""
        like = prompt_embedding
        return cls(
            latents=initial_noise(seed, rows, columns, channels, like.dtype, like.device),
            step_count=step_count,
            prompt_embedding=prompt_embedding,
            negative_prompt_embedding=negative_prompt_embedding,
            guidance_scale=guidance_scale,
            references=references,
            reference_cache=reference_cache,
            adapters=adapters,
        )

    @property
    def sigma(self) -> float:
        """Noise level of `latents`: 1 at the start, 0 when finished."""
        return self.sigmas[self.step_index]

    @property
    def finished(self) -> bool:
        """Whether `latents` are the result."""
        return self.step_index == self.step_count

    @property
    def spans(self) -> list[Span]:
        """What the next step has to compute: one span, or with guidance two, the positive first."""
        return [
            Span(embedding, self.latents, self.references, self.sigma, self.reference_cache, self.adapters)
            for embedding in self.prompt_embeddings
        ]

    def advance(self, velocities: Sequence[Tensor]) -> None:
        """Takes one Euler step with the velocities of `spans`, in their order.

        The step is computed in float32 and rounded to the velocity's dtype, as diffusers'
        `FlowMatchEulerDiscreteScheduler` does.
        """
        velocity = self._guided(velocities)
        levels = torch.tensor([self.sigma, self.sigmas[self.step_index + 1]], dtype=torch.float32)
        step = levels[1] - levels[0]
        self.latents = (self.latents.float() + step * velocity).to(velocity.dtype)
        self._velocity = velocity
        self.step_index += 1

    def preview(self) -> Tensor:
        """Estimates the finished latents: x − σ·v, or `latents` as long as no step was taken here."""
        if self._velocity is None:
            return self.latents
        return (self.latents.float() - self.sigma * self._velocity.float()).to(self.latents.dtype)

    def _guided(self, velocities: Sequence[Tensor]) -> Tensor:
        if len(velocities) == 1:
            return velocities[0]
        positive, negative = velocities
        return negative + self.guidance_scale * (positive - negative)


def _prompt_embeddings(
    positive: Tensor, negative: Tensor | None, guidance_scale: float
) -> tuple[Tensor, ...]:
    if guidance_scale <= 1:
        return (positive,)
    if negative is None:
        raise InvalidInput.of("negative_prompt_embedding", "is missing; guidance above 1 needs it")
    return positive, negative


@torch.no_grad()
def packed_step(transformer: FlowTransformer, trajectories: Sequence[Trajectory]) -> None:
    """Advances every trajectory by one step with a single forward pass over all their spans.

    Raises:
        InvalidInput: a trajectory's tensors do not fit the model, or it is finished already.
    """
    if any(trajectory.finished for trajectory in trajectories):
        raise InvalidInput.of("trajectories", "includes a finished one")
    spans = [trajectory.spans for trajectory in trajectories]
    velocities = iter(transformer([span for group in spans for span in group]))
    for trajectory, group in zip(trajectories, spans, strict=True):
        trajectory.advance([next(velocities) for _ in group])
