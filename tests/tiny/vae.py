"""Tiny random autoencoders made by diffusers: oracles for both directions."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLFlux2
from torch import nn

SHAPE: dict[str, Any] = {
    "block_out_channels": (32, 32, 64, 64),
    "decoder_block_out_channels": (32, 32, 32, 32),
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 1024,
}
"""The smallest shape with klein's four levels, 32 groups and a decoder of its own widths."""


def tiny_vae(seed: int = 0, **changes: Any) -> AutoencoderKLFlux2:
    """Builds diffusers' autoencoder with visible spread; its images fill −1…1 without saturating."""
    vae = AutoencoderKLFlux2(**{**SHAPE, **changes}).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    spread_weights(vae, generator)
    vae.decoder.conv_out.weight.mul_(0.1)
    vae.encoder.conv_out.weight.mul_(0.3)
    shape = vae.bn.running_mean.shape
    vae.bn.running_mean.copy_(torch.randn(shape, generator=generator))
    # From far below the normalization's epsilon to far above it, so that a wrong epsilon shows.
    vae.bn.running_var.copy_(10 ** (torch.rand(shape, generator=generator) * 6 - 5))
    return vae


def spread_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Draws matrices with std 0.3 (less where many inputs add up) and gains from 0.5 to 1.5."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
            else:
                spread = min(0.3, 2 / max(parameter[0].numel(), 1) ** 0.5)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
