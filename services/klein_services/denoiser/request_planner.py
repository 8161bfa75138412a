"""What a request means for the device: tokens, memory and trajectories."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klein_core.denoiser.adapters.adapter import ScaledAdapter
from klein_core.denoiser.sampler import Trajectory, initial_noise
from klein_core.params import SIZE_MULTIPLE_PX
from klein_core.variants import default_guidance_scale
from klein_services.denoiser.job import CacheSpec, JobSpec
from klein_services.denoiser.request import Conditioning, Model, Order
from klein_services.denoiser.request_state import Run
from klein_services.denoiser.warmup import STEPS_NEEDED

CACHED_TOKENS_PER_TOKEN = 8
"""Cached reference tokens that make a step about as much longer as one token of its own.

An attended token costs 4·q·d operations a layer, where q are the step's tokens, and one of its own 26·d² besides: a
seventeenth for 512² on klein-9B, a sixth for 1024².
"""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Turns orders into jobs.

    Args:
        model: the model that is served.
        device: where trajectories live.
        text_tokens: what a prompt embedding is taken to have before it has come.
    """

    model: Model
    device: torch.device
    text_tokens: int

    def expected(self, order: Order, deadline: float | None) -> JobSpec:
        """Returns the job as far as the spec tells; references count nothing yet, so it is a lower bound."""
        return self._job(order, deadline, self.text_tokens, reference_tokens=0)

    def newcomer(self, side_px: int) -> JobSpec:
        """Returns the job of a plain request for one square image."""
        return JobSpec(image_tokens=self.sample_tokens(side_px, side_px), step_count=1)

    def sample_tokens(self, width_px: int, height_px: int) -> int:
        """Returns the tokens of one step of `sample`."""
        target = (width_px // SIZE_MULTIPLE_PX) * (height_px // SIZE_MULTIPLE_PX)
        return _image_tokens(self.text_tokens, target, uses_guidance=not self.model.is_distilled)

    def sample(self, width_px: int, height_px: int) -> Trajectory:
        """Makes up an image to warm up with, guided where requests are by default."""
        embedding = torch.zeros(
            self.text_tokens, self.model.embedding_channels, dtype=self.model.dtype, device=self.device
        )
        return Trajectory.from_noise(
            seed=0,
            rows=height_px // SIZE_MULTIPLE_PX,
            columns=width_px // SIZE_MULTIPLE_PX,
            channels=self.model.latent_channels,
            step_count=STEPS_NEEDED,
            prompt_embedding=embedding,
            negative_prompt_embedding=embedding,
            guidance_scale=default_guidance_scale(self.model.is_distilled),
        )

    def prepared(
        self,
        order: Order,
        deadline: float | None,
        conditioning: Conditioning,
        adapters: tuple[ScaledAdapter, ...] = (),
    ) -> tuple[JobSpec, Run]:
        """Returns the job as it is and its trajectories, noise made. Slow: not for the event loop."""
        references = tuple(reference.to(self.device) for reference in conditioning.references)
        cache = self._cache(conditioning.references, adapters)
        tokens = sum(map(_tokens, references))
        job = self._job(order, deadline, len(conditioning.prompt_embedding), tokens, cache)
        run = Run(
            trajectories=self._trajectories(order, conditioning, () if cache else references, adapters),
            cached_references=references if cache else (),
            adapters=adapters,
            preview_interval_steps=order.preview_interval_steps,
            checkpoint_interval_steps=order.checkpoint_interval_steps,
        )
        return job, run

    def _cache(self, references: Sequence[Tensor], adapters: tuple[ScaledAdapter, ...]) -> CacheSpec | None:
        model = self.model
        if not model.cached_token_bytes or not references:
            return None
        tokens = sum(map(_tokens, references))
        return CacheSpec(
            key=references_key(
                references, model.name, model.weights_digest, *(adapter.identity for adapter in adapters)
            ),
            tokens=tokens,
            size_bytes=tokens * model.cached_token_bytes,
        )

    def _trajectories(
        self,
        order: Order,
        conditioning: Conditioning,
        references: tuple[Tensor, ...],
        adapters: tuple[ScaledAdapter, ...],
    ) -> list[Trajectory]:
        """Makes one trajectory for each image: the unit that is stepped, alone or packed with others."""
        params = order.params
        negative = conditioning.negative_prompt_embedding
        prompt = conditioning.prompt_embedding.to(self.device)
        negative = None if negative is None else negative.to(self.device)
        return [
            Trajectory(
                latents=latents.to(self.device),
                step_count=params.steps,
                step_index=order.resume_step,
                prompt_embedding=prompt,
                negative_prompt_embedding=negative,
                guidance_scale=params.guidance,
                references=references,
                adapters=adapters,
            )
            for latents in conditioning.resume_latents or self._noises(order)
        ]

    def _noises(self, order: Order) -> list[Tensor]:
        params, model = order.params, self.model
        return [
            initial_noise(seed, params.rows, params.columns, model.latent_channels, model.dtype)
            for seed in params.seeds
        ]

    def _job(
        self,
        order: Order,
        deadline: float | None,
        text_tokens: int,
        reference_tokens: int,
        cache: CacheSpec | None = None,
    ) -> JobSpec:
        params, channels = order.params, self.model.latent_channels
        target = params.rows * params.columns
        attended = reference_tokens if cache is None else reference_tokens // CACHED_TOKENS_PER_TOKEN
        spans = 2 if params.uses_guidance else 1
        elements = spans * text_tokens * self.model.embedding_channels
        elements += (reference_tokens + spans * len(params.seeds) * target) * channels
        return JobSpec(
            image_tokens=_image_tokens(text_tokens, target + attended, params.uses_guidance),
            step_count=params.steps,
            image_count=len(params.seeds),
            first_step=order.resume_step,
            urgency=order.urgency,
            deadline=deadline,
            memory_bytes=elements * self.model.dtype.itemsize,
            cache=cache,
        )


def references_key(references: Sequence[Tensor], *circumstances: str) -> str:
    """Returns a digest of references, in their order, and of whatever else decides what is computed from them.

    SHA-256: requests share what is kept under it, so nobody may be able to make two contents collide.

    Args:
        references: on the host, of any shapes.
        circumstances: the model, for one.
    """
    digest = hashlib.sha256(repr(circumstances).encode())
    for reference in references:
        digest.update(f"{reference.dtype} {tuple(reference.shape)}\n".encode())
        digest.update(reference.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _image_tokens(text: int, image: int, uses_guidance: bool) -> int:
    return (text + image) * (2 if uses_guidance else 1)


def _tokens(latents: Tensor) -> int:
    return latents.shape[0] * latents.shape[1]
