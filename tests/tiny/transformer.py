"""Tiny random transformers made by diffusers: oracles for the denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor

from klein_core.checkpoint.key_maps import checkpoint_names
from klein_core.denoiser.packing import Span
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.variants import TransformerConfig

SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 4, 4, 4),
    "joint_attention_dim": 24,
    "in_channels": 16,
    "rope_theta": 2000,
    "guidance_embeds": False,
}
"""The smallest network in which every part matters."""


def tiny_oracle(seed: int = 0, **changes: Any) -> Flux2Transformer2DModel:
    """Builds diffusers' network with weights spread widely enough (std 0.3) that any slip shows."""
    oracle = Flux2Transformer2DModel(**{**SHAPE, **changes}).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in oracle.named_parameters():
        if "norm_" in name and parameter.ndim == 1:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        else:
            spread = min(0.3, 2 / parameter.shape[-1] ** 0.5)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return oracle


def save_tiny_transformer(checkpoint_folder: Path, **changes: Any) -> Flux2Transformer2DModel:
    """Writes `checkpoint_folder/transformer` in diffusers' layout and returns the network."""
    oracle = tiny_oracle(**changes)
    oracle.save_pretrained(checkpoint_folder / "transformer")
    return oracle


def random_span(
    grids: Sequence[tuple[int, int]],
    *,
    sigma: float = 0.7,
    text_length: int = 7,
    seed: int = 0,
    joint_attention_dim: int = 24,
    in_channels: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Span:
    """Makes a span of normal noise; `grids` lists the target first, then references."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(*grid, in_channels, generator=generator).to(dtype) for grid in grids]
    prompt = torch.randn(text_length, joint_attention_dim, generator=generator).to(dtype)
    return Span(prompt, images[0], tuple(images[1:]), sigma)


def twin(oracle: Flux2Transformer2DModel) -> FlowTransformer:
    """Builds our network on the oracle's weights and dtype."""
    known = {field.name for field in fields(TransformerConfig)}
    config = TransformerConfig(**{name: value for name, value in oracle.config.items() if name in known})
    weights, fused = oracle.state_dict(), checkpoint_names(config)
    with torch.device("meta"):
        ours = FlowTransformer(config)
    state = {
        name: torch.cat([weights[part] for part in fused[name]]) if name in fused else weights[name]
        for name in ours.state_dict()
    }
    ours.load_state_dict(state, assign=True)
    return ours.eval().requires_grad_(False)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Returns the norm of the difference over the norm of what was expected."""
    return float((result.float() - expected.float()).norm() / expected.float().norm())


def oracle_velocity(oracle: Flux2Transformer2DModel, span: Span, *, gradients: bool = False) -> Tensor:
    """Runs diffusers' network the way its pipeline does: (rows, columns, channels)."""

    def channels_first(image: Tensor) -> Tensor:
        return image.permute(2, 0, 1)[None]

    images = [channels_first(image) for image in (span.latents, *span.references)]
    ids = [Flux2KleinPipeline._prepare_latent_ids(images[0])]
    if span.references:
        ids.append(Flux2KleinPipeline._prepare_image_ids(images[1:]))
    tokens = torch.cat([Flux2KleinPipeline._pack_latents(image) for image in images], dim=1)
    prompt = span.prompt_embedding[None]
    timestep = torch.tensor([span.sigma], dtype=torch.float32) * 1000
    with torch.set_grad_enabled(gradients):
        velocity = oracle(
            hidden_states=tokens.to(oracle.dtype),
            timestep=timestep.to(span.latents.dtype) / 1000,
            guidance=None,
            encoder_hidden_states=prompt.to(oracle.dtype),
            txt_ids=Flux2KleinPipeline._prepare_text_ids(prompt),
            img_ids=torch.cat(ids, dim=1),
            return_dict=False,
        )[0]
    return velocity[0, : span.target_length].unflatten(0, span.latents.shape[:2])
