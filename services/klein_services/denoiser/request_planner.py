"""RequestPlanner: computes what a request costs, and prepares its tensors and trajectories for the engine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from klein_core.denoiser.adapters.adapter import ScaledAdapter
from klein_core.denoiser.inpainting import Inpainting
from klein_core.denoiser.sampler import Trajectory, initial_noise
from klein_core.params import SIZE_MULTIPLE_PX
from klein_core.variants import default_guidance_scale
from klein_services.denoiser.request import DenoiseParams, RequestTensors, ServedModel
from klein_services.denoiser.request_state import RequestState
from klein_services.denoiser.scheduled_request import CacheSpec, ScheduledRequest
from klein_services.denoiser.warmup import STEPS_NEEDED
from klein_services.runtime.caller import caller

CACHED_TOKENS_PER_TOKEN = 8
"""Cached reference tokens that cost about as much step time as one ordinary token.

Attending to a cached token costs 4·q·d operations per layer, where q is the step's token count; an ordinary token
costs 26·d² in addition: for klein-9B, 17 times as much at 512² and 6 times at 1024².
"""


@dataclass(frozen=True, kw_only=True)
class RequestPlanner:
    """Plans requests for one model on one device.

    Args:
        model: the served model.
        device: the device of the trajectories.
        text_tokens: prompt length assumed until the embedding arrives.
    """

    model: ServedModel
    device: torch.device
    text_tokens: int

    def scheduled_request(self, params: DenoiseParams, deadline: float | None) -> ScheduledRequest:
        """Returns the request with a lower bound of its cost: of its references only the initial image's size is known.

        Args:
            params: the validated spec.
            deadline: time on the engine's clock when the client stops waiting.
        """
        generation = params.generation
        return ScheduledRequest(
            image_tokens=self._image_tokens(params, self.text_tokens, params.initial_tokens),
            step_count=generation.steps,
            image_count=len(generation.seeds),
            first_step=params.first_step,
            urgency=params.urgency,
            deadline=deadline,
            caller=caller.get(),
            is_resumed=params.resume_step > 0,
            memory_bytes=self._memory_bytes(params, self.text_tokens, params.initial_tokens),
        )

    def request_state(
        self, params: DenoiseParams, tensors: RequestTensors, adapters: tuple[ScaledAdapter, ...] = ()
    ) -> RequestState:
        """Moves the tensors to the device and generates the noise. Slow: call it off the event loop."""
        reference_tokens = sum(latents.shape[0] * latents.shape[1] for latents in tensors.references)
        cache = self._cache_spec(tensors.references, reference_tokens, adapters)
        text_tokens = len(tensors.prompt_embedding)
        references = tuple(reference.to(self.device) for reference in tensors.references)
        return RequestState(
            trajectories=self._trajectories(
                params, tensors, references, adapters, is_cached=cache is not None
            ),
            image_tokens=self._image_tokens(params, text_tokens, reference_tokens),
            memory_bytes=self._memory_bytes(params, text_tokens, reference_tokens),
            cache=cache,
            cached_references=references if cache else (),
            adapters=adapters,
            preview_interval_steps=params.preview_interval_steps,
            checkpoint_interval_steps=params.checkpoint_interval_steps,
        )

    def probe(self, side_px: int) -> ScheduledRequest:
        """Returns the probe request: one square image without references, to estimate waiting times with."""
        return ScheduledRequest(image_tokens=self.sample_tokens(side_px, side_px), step_count=1)

    def sample_tokens(self, width_px: int, height_px: int) -> int:
        """Returns the tokens of one step of `sample`."""
        target = (width_px // SIZE_MULTIPLE_PX) * (height_px // SIZE_MULTIPLE_PX)
        return (self.text_tokens + target) * (1 if self.model.is_distilled else 2)

    def sample(self, width_px: int, height_px: int) -> Trajectory:
        """Returns a trajectory to warm up with, guided if requests are by default.

        Its prompt is random: products of zeros draw less power, so that a GPU's clock and speed are higher than later.
        """
        shape = (self.text_tokens, self.model.embedding_channels)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        embedding = noise.to(device=self.device, dtype=self.model.dtype)
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

    def _cache_spec(
        self, references: Sequence[Tensor], tokens: int, adapters: tuple[ScaledAdapter, ...]
    ) -> CacheSpec | None:
        """Returns the reference cache that a request needs; `None` if its references are ordinary tokens."""
        model = self.model
        if not model.cached_token_bytes or not references:
            return None
        salt = (model.name, model.weights_digest, *(adapter.identity for adapter in adapters))
        return CacheSpec(
            key=references_key(references, *salt),
            tokens=tokens,
            size_bytes=tokens * model.cached_token_bytes,
        )

    def _trajectories(
        self,
        params: DenoiseParams,
        tensors: RequestTensors,
        references: tuple[Tensor, ...],
        adapters: tuple[ScaledAdapter, ...],
        *,
        is_cached: bool,
    ) -> list[Trajectory]:
        """Returns one trajectory per image.

        Args:
            params: the validated spec.
            tensors: the request's, in host memory.
            references: those of `tensors`, on the device.
            adapters: of the trajectories.
            is_cached: whether the trajectories get a cache in place of the references.
        """
        generation = params.generation
        negative = tensors.negative_prompt_embedding
        conditioning: dict[str, Any] = {
            "step_count": generation.steps,
            "prompt_embedding": tensors.prompt_embedding.to(self.device),
            "negative_prompt_embedding": None if negative is None else negative.to(self.device),
            "guidance_scale": generation.guidance,
            "references": () if is_cached else references,
            "adapters": adapters,
            "schedule": self.model.schedule,
        }

        def noise(seed: int) -> Tensor:
            shape = generation.rows, generation.columns, self.model.latent_channels
            return initial_noise(seed, *shape, self.model.dtype, self.device)

        inpaintings: list[Inpainting] = []
        if tensors.mask is not None:
            mask = tensors.mask.to(self.device)
            inpaintings = [Inpainting(references[0], mask, noise(seed)) for seed in generation.seeds]
        if params.resume_step:
            return [
                Trajectory(
                    latents=latents.to(self.device),
                    step_index=params.resume_step,
                    inpainting=inpainting,
                    **conditioning,
                )
                for latents, inpainting in zip_longest(tensors.resume_latents, inpaintings)
            ]
        if params.strength is not None:
            return [
                Trajectory.from_image(inpainting=inpainting, strength=params.strength, **conditioning)
                for inpainting in inpaintings
            ]
        return [Trajectory(latents=noise(seed), **conditioning) for seed in generation.seeds]

    def _image_tokens(self, params: DenoiseParams, text_tokens: int, reference_tokens: int) -> int:
        """Returns the tokens of one step of one image; where references are cached, theirs count less."""
        cached = CACHED_TOKENS_PER_TOKEN if self.model.cached_token_bytes else 1
        attended_tokens = reference_tokens // cached
        generation = params.generation
        target = generation.rows * generation.columns
        return (text_tokens + target + attended_tokens) * (2 if generation.uses_guidance else 1)

    def _memory_bytes(self, params: DenoiseParams, text_tokens: int, reference_tokens: int) -> int:
        """Returns the bytes of a request's embeddings, references, latents, and of a masked edit's noise and mask."""
        generation = params.generation
        spans = 2 if generation.uses_guidance else 1
        latent_tokens = (
            reference_tokens + spans * len(generation.seeds) * generation.rows * generation.columns
        )
        latent_tokens += len(generation.seeds) * params.initial_tokens
        elements = params.initial_tokens + spans * text_tokens * self.model.embedding_channels
        elements += latent_tokens * self.model.latent_channels
        return elements * self.model.dtype.itemsize


def references_key(references: Sequence[Tensor], *salt: str) -> str:
    """Returns a SHA-256 digest of references, in their order, and of a salt.

    Requests of different clients share the cache under this key, so collisions must not be constructible.

    Args:
        references: tensors of any shapes in host memory.
        salt: everything else that the cache depends on, such as the model and the adapters.
    """
    digest = hashlib.sha256(repr(salt).encode())
    for reference in references:
        digest.update(f"{reference.dtype} {tuple(reference.shape)}\n".encode())
        digest.update(reference.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
