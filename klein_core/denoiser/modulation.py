"""What the noise level does to the network: a timestep embedding and the modulation made from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klein_core.denoiser.workspace import Workspace
from klein_core.linear import Linear

TIMESTEP_SCALE = 1000
MAX_PERIOD = 10000


def effective_timesteps(sigmas: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns 1000·σ as the reference rounds it: to `dtype` before a division and a product by 1000.

    In bfloat16 the order is visible: 512² at 4 steps gives 1000, 960, 884, 716 and not 1000, 956, 884, 720.
    Source: diffusers' `Flux2KleinPipeline` (division) and `Flux2Transformer2DModel` (product).
    """
    return (sigmas.float() * TIMESTEP_SCALE).to(dtype) / TIMESTEP_SCALE * TIMESTEP_SCALE


def sinusoid(timesteps: Tensor, channels: int) -> Tensor:
    """Returns (spans, channels) fp32: cosines, then sines, of t · 10000^(−i / (channels / 2))."""
    half = channels // 2
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(MAX_PERIOD) * index / half)
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """Two linear layers with a SiLU between them."""

    __call__: Callable[..., Tensor]

    def __init__(self, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = Linear(channels, hidden_size)
        self.linear_2 = Linear(hidden_size, hidden_size)

    def forward(self, wave: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(wave)))


class TimestepEmbedding(nn.Module):
    """Noise levels (spans,) → embeddings (spans, hidden)."""

    __call__: Callable[..., Tensor]

    def __init__(self, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.channels = channels
        self.timestep_embedder = TimestepEmbedder(channels, hidden_size)

    def forward(self, sigmas: Tensor, dtype: torch.dtype) -> Tensor:
        wave = sinusoid(effective_timesteps(sigmas, dtype), self.channels)
        return self.timestep_embedder(wave.to(dtype))


class ModulationLayer(nn.Module):
    """Embeddings (spans, hidden) → (spans, chunks · hidden)."""

    __call__: Callable[..., Tensor]

    def __init__(self, hidden_size: int, chunks: int) -> None:
        super().__init__()
        self.linear = Linear(hidden_size, chunks * hidden_size)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.linear(F.silu(embedding))


class Modulation(NamedTuple):
    """How one sublayer is conditioned; each (spans, 1, hidden).

    Kept per span: spread over tokens it would take as much as the tokens, several times, for the whole step.
    """

    shift: Tensor
    scale: Tensor
    """1 + the network's scale."""
    gate: Tensor
    owners: Tensor | None = None
    """(tokens,): the span of each token, where spans are not a batch."""

    def enter(self, tokens: Tensor, eps: float, scratch: Workspace) -> Tensor:
        """Returns LayerNorm(tokens) · scale + shift."""
        scale, shift = spread(self.scale, self.owners), spread(self.shift, self.owners)
        return modulated_norm(tokens, scale, shift, eps, scratch)

    def leave(self, residual: Tensor, update: Tensor, scratch: Workspace) -> Tensor:
        """Returns residual + gate · update, over the residual if that may be."""
        gate = spread(self.gate, self.owners)
        return torch.addcmul(residual, gate, update, out=scratch.over(residual))


def modulations(per_span: Tensor, sublayers: int, owners: Tensor | None = None) -> tuple[Modulation, ...]:
    """Cuts a layer's output (spans, 1, channels) into shift, scale and gate of each sublayer."""
    chunks = per_span.chunk(3 * sublayers, dim=-1)
    return tuple(
        Modulation(chunks[i], 1 + chunks[i + 1], chunks[i + 2], owners) for i in range(0, len(chunks), 3)
    )


def spread(per_span: Tensor, owners: Tensor | None) -> Tensor:
    """Makes (spans, 1, channels) broadcastable to tokens: as it is for a batch, else (1, tokens, channels)."""
    return per_span if owners is None else per_span.index_select(0, owners).transpose(0, 1)


def modulated_norm(tokens: Tensor, scale: Tensor, shift: Tensor, eps: float, scratch: Workspace) -> Tensor:
    """Returns LayerNorm(tokens) · scale + shift over the last axis."""
    normed = F.layer_norm(tokens, tokens.shape[-1:], eps=eps)
    return torch.addcmul(shift, normed, scale, out=scratch.over(normed))
