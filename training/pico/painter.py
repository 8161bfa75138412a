"""Batched sampling with a checkpoint, for evaluation and sample sheets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from klein_core.denoiser.sampler import Trajectory, packed_step
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.text_encoder.encoder import TextEncoder
from klein_core.vae_decoder.decoder import VaeDecoder
from training.pico.world import TOKEN_PX, Scene, render

STEP_COUNT = 4
_AT_ONCE = 20
Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class PaintRequest:
    """Prompt, size, seed and references of one image."""

    prompt: str
    width_px: int
    height_px: int
    seed: int
    references: tuple[Scene, ...] = ()
    reference_sizes: tuple[tuple[int, int], ...] = ()
    """Width and height in pixels of each reference."""


class Painter:
    """All three parts of one checkpoint.

    Args:
        folder: the checkpoint in the diffusers layout.
        dtype: precision of weights and activations; `None` is the checkpoint's own.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        self._text_encoder = TextEncoder.from_folder(folder, dtype=dtype)
        self._transformer = FlowTransformer.from_folder(folder, dtype=dtype)
        self._vae = VaeDecoder.from_folder(folder, dtype=dtype)

    def paint(self, requests: Sequence[PaintRequest], step_count: int = STEP_COUNT) -> list[Picture]:
        """Paints in batches of equal lengths; returns RGB pictures (H, W, 3) in the order of `requests`."""
        by_shape = sorted(range(len(requests)), key=lambda i: (_shape(requests[i]), i))
        painted: dict[int, Picture] = {}
        for first in range(0, len(by_shape), _AT_ONCE):
            chosen = by_shape[first : first + _AT_ONCE]
            pictures = self._paint([requests[i] for i in chosen], step_count)
            painted.update(zip(chosen, pictures, strict=True))
        return [painted[i] for i in range(len(requests))]

    def round_trip(self, picture: Picture) -> Picture:
        """Encodes and decodes one picture (H, W, 3)."""
        return self._decode(self._vae.encode(_image(picture)))

    def _paint(self, requests: Sequence[PaintRequest], step_count: int) -> list[Picture]:
        prompts = self._text_encoder.encode([request.prompt for request in requests])
        trajectories = [
            Trajectory.from_noise(
                seed=request.seed,
                rows=request.height_px // TOKEN_PX,
                columns=request.width_px // TOKEN_PX,
                channels=self._transformer.config.in_channels,
                step_count=step_count,
                prompt_embedding=prompt.embedding,
                references=self._references(request),
            )
            for request, prompt in zip(requests, prompts, strict=True)
        ]
        for _ in range(step_count):
            packed_step(self._transformer, trajectories)
        return [self._decode(trajectory.latents) for trajectory in trajectories]

    def _references(self, request: PaintRequest) -> tuple[Tensor, ...]:
        return tuple(
            self._vae.encode(_image(render(scene, *size)))
            for scene, size in zip(request.references, request.reference_sizes, strict=True)
        )

    def _decode(self, latents: Tensor) -> Picture:
        return np.asarray(self._vae.decode(latents).numpy(), np.uint8)


def _shape(request: PaintRequest) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    return request.width_px, request.height_px, request.reference_sizes


def _image(picture: Picture) -> Tensor:
    """Returns (H, W, 3) in -1…1."""
    return torch.from_numpy(picture).float() / 127.5 - 1
