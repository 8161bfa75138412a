"""Sampler: trajectories from noise to data, their Euler steps, and the schedule of noise levels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from klein_core.denoiser.adapters.adapter import ScaledAdapter
from klein_core.denoiser.inpainting import Inpainting, first_step
from klein_core.denoiser.packing import Span
from klein_core.denoiser.reference_cache import ReferenceCache
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.errors import InvalidInput
from klein_core.variants import PUBLISHED_SCHEDULE, NoiseSchedule

LARGE_IMAGE_TOKENS = 4300
"""Up to this many target tokens the shift depends on the step count; above, it does not, and drops sharply."""


class Trajectory:
    """One image's state during sampling. Images of one request share its prompt, references and adapters."""

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
        schedule: NoiseSchedule = PUBLISHED_SCHEDULE,
        inpainting: Inpainting | None = None,
    ) -> None:
        """Starts at, or resumes from, the latents before step `step_index`.

        Args:
            latents: (rows, columns, channels); pure noise if `step_index` is 0.
            step_count: steps from noise to data, completed ones included.
            step_index: completed steps.
            prompt_embedding: (text tokens, joint attention channels).
            negative_prompt_embedding: same shape; required if `guidance_scale` is above 1, else ignored.
            guidance_scale: above 1, each step has two spans; up to 1, there is no guidance and one span.
            references: clean latents, (rows, columns, channels) each.
            reference_cache: replaces `references`, for models of the reference-cache kind. May also be assigned
                before the first step.
            adapters: applied to both spans of guidance; those with a scale of 0 are dropped.
            schedule: shift of the noise levels.
            inpainting: the initial image of a masked edit; what lies outside its mask is kept.

        Raises:
            InvalidInput: latents do not have three axes, the step index is outside 0…step_count, or the negative
                prompt that guidance needs is missing.
        """
        if latents.ndim != 3:
            raise InvalidInput.of(
                "latents", f"has shape {tuple(latents.shape)}; must be (rows, columns, channels)"
            )
        self.sigmas = sigmas(latents.shape[0] * latents.shape[1], step_count, schedule)
        if not 0 <= step_index <= step_count:
            raise InvalidInput.of("step_index", f"is {step_index}; must be 0 to {step_count}")
        self.prompt_embeddings: tuple[Tensor, ...] = (prompt_embedding,)
        """One, or with guidance two, the positive first."""
        if guidance_scale > 1:
            if negative_prompt_embedding is None:
                raise InvalidInput.of("negative_prompt_embedding", "is missing; guidance above 1 needs it")
            self.prompt_embeddings += (negative_prompt_embedding,)
        self.guidance_scale = guidance_scale
        self.references = references
        self.reference_cache = reference_cache
        self.adapters = tuple(each for each in adapters if each.scale)
        self.latents = latents
        self.step_count = step_count
        self.step_index = step_index
        self._inpainting = inpainting
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
        schedule: NoiseSchedule = PUBLISHED_SCHEDULE,
    ) -> Trajectory:
        """Starts from `initial_noise`, in the prompt embedding's dtype and on its device."""
        dtype, device = prompt_embedding.dtype, prompt_embedding.device
        return cls(
            latents=initial_noise(seed, rows, columns, channels, dtype, device),
            step_count=step_count,
            prompt_embedding=prompt_embedding,
            negative_prompt_embedding=negative_prompt_embedding,
            guidance_scale=guidance_scale,
            references=references,
            reference_cache=reference_cache,
            adapters=adapters,
            schedule=schedule,
        )

    @classmethod
    def from_image(
        cls,
        *,
        inpainting: Inpainting,
        strength: float,
        step_count: int,
        prompt_embedding: Tensor,
        negative_prompt_embedding: Tensor | None = None,
        guidance_scale: float = 1.0,
        references: tuple[Tensor, ...] = (),
        reference_cache: ReferenceCache | None = None,
        adapters: Sequence[ScaledAdapter] = (),
        schedule: NoiseSchedule = PUBLISHED_SCHEDULE,
    ) -> Trajectory:
        """Starts from the initial image, noised to the level of the first step that `strength` leaves.

        Raises:
            InvalidInput: as the constructor and `first_step`.
        """
        rows, columns, _ = inpainting.latents.shape
        first = first_step(step_count, strength)
        return cls(
            latents=inpainting.noised(sigmas(rows * columns, step_count, schedule)[first]),
            step_count=step_count,
            step_index=first,
            prompt_embedding=prompt_embedding,
            negative_prompt_embedding=negative_prompt_embedding,
            guidance_scale=guidance_scale,
            references=references,
            reference_cache=reference_cache,
            adapters=adapters,
            schedule=schedule,
            inpainting=inpainting,
        )

    @property
    def sigma(self) -> float:
        """Noise level of `latents`: 1 at the start, 0 at the end."""
        return self.sigmas[self.step_index]

    @property
    def finished(self) -> bool:
        """Whether all steps are completed, so that `latents` are the result."""
        return self.step_index == self.step_count

    @property
    def spans(self) -> list[Span]:
        """The next step's input: one span, or with guidance two, the positive first."""
        return [
            Span(embedding, self.latents, self.references, self.sigma, self.reference_cache, self.adapters)
            for embedding in self.prompt_embeddings
        ]

    def advance(self, velocities: Sequence[Tensor]) -> None:
        """Takes one Euler step, with one velocity for each of `spans`, in their order.

        The step is computed in float32 and rounded to the velocity's dtype, as diffusers'
        `FlowMatchEulerDiscreteScheduler` does.
        """
        if len(velocities) == 1:
            (velocity,) = velocities
        else:
            positive, negative = velocities
            velocity = negative + self.guidance_scale * (positive - negative)
        levels = torch.tensor([self.sigma, self.sigmas[self.step_index + 1]], dtype=torch.float32)
        step = levels[1] - levels[0]
        self.latents = (self.latents.float() + step * velocity).to(velocity.dtype)
        self._velocity = velocity
        self.step_index += 1
        if self._inpainting is not None:
            self.latents = self._inpainting.blended(self.latents, self.sigma)

    def preview(self) -> Tensor:
        """Estimates the final latents: x − σ·v, or `latents` before the first step of this object."""
        if self._velocity is None:
            return self.latents
        clean = (self.latents.float() - self.sigma * self._velocity.float()).to(self.latents.dtype)
        return clean if self._inpainting is None else self._inpainting.blended(clean, 0.0)


@torch.no_grad()
def packed_step(transformer: FlowTransformer, trajectories: Sequence[Trajectory]) -> None:
    """Advances every trajectory by one step with a single forward pass over all their spans.

    Raises:
        InvalidInput: a trajectory's tensors do not fit the model, or it is finished.
    """
    if any(trajectory.finished for trajectory in trajectories):
        raise InvalidInput.of("trajectories", "must not include a finished one")
    spans = [trajectory.spans for trajectory in trajectories]
    velocities = iter(transformer([span for each in spans for span in each]))
    for trajectory, each in zip(trajectories, spans, strict=True):
        trajectory.advance([next(velocities) for _ in each])


def received(tensor: Tensor, dtype: torch.dtype, field: str) -> Tensor:
    """Returns an input of the denoiser in the transformer's dtype, in which noise is drawn and steps are taken.

    Other stages may hold their weights in another dtype and send tensors of that one.

    Args:
        tensor: as its sender made it.
        dtype: the transformer's.
        field: name of the tensor in errors.

    Raises:
        InvalidInput: values are NaN or infinite, or too large for `dtype`.
    """
    cast = tensor.to(dtype)
    if not bool(cast.isfinite().all()):
        if bool(tensor.isfinite().all()):
            name, largest = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
            raise InvalidInput.of(
                field,
                f"holds values outside ±{largest:g}, the range of {name}, in which the transformer computes",
            )
        raise InvalidInput.of(field, "holds NaN or infinity; all elements must be finite")
    return cast


def empirical_mu(token_count: int, step_count: int) -> float:
    """Returns the logarithm of the shift for `token_count` target tokens (references do not count).

    Interpolates in the step count between two lines fitted at 10 and 200 steps. Source of the constants:
    `compute_empirical_mu` in black-forest-labs/flux2 and diffusers.
    """
    many_steps = 0.00016927 * token_count + 0.45666666
    if token_count > LARGE_IMAGE_TOKENS:
        return many_steps
    few_steps = 8.73809524e-05 * token_count + 1.89833333
    slope = (many_steps - few_steps) / 190.0
    return slope * step_count + (many_steps - 200.0 * slope)


def sigmas(token_count: int, step_count: int, schedule: NoiseSchedule = PUBLISHED_SCHEDULE) -> list[float]:
    """Returns `step_count` + 1 noise levels from 1 down to 0, each exactly representable in float32.

    A shift s maps a level t to s·t / (1 + (s − 1)·t). Source: `Flux2KleinPipeline` and
    `FlowMatchEulerDiscreteScheduler` in diffusers, which order the terms differently for a dynamic and a static shift;
    float32 rounds the two orders differently.

    Raises:
        InvalidInput: there are no tokens or no steps.
    """
    if token_count < 1:
        raise InvalidInput.of("token_count", f"is {token_count}; must be at least 1")
    if step_count < 1:
        raise InvalidInput.of("step_count", f"is {step_count}; must be at least 1")
    line = np.linspace(1.0, 1 / step_count, step_count).astype(np.float32)
    if schedule.is_dynamic:
        mu = empirical_mu(token_count, step_count)
        shift = mu if schedule.is_linear else math.exp(mu)
        shifted = shift / (shift + (1 / line - 1))
    else:
        shifted = schedule.shift * line / (1 + (schedule.shift - 1) * line)
    return [*shifted.astype(np.float32).tolist(), 0.0]


def initial_noise(
    seed: int,
    rows: int,
    columns: int,
    channels: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Returns (rows, columns, channels) of standard normal noise.

    Drawn on the CPU, so that a seed gives the same noise on every device. Drawn in `dtype` and channels first, as in
    diffusers: another dtype or order gives another image for the same seed.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn((1, channels, rows, columns), generator=generator, dtype=dtype)
    return noise[0].permute(1, 2, 0).contiguous().to(device)
