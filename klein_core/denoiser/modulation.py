"""Adaptive normalization: the noise level's embedding, and the shift, scale and gate computed from it."""

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


class Modulation(NamedTuple):
    """Shift, scale and gate of one sublayer; each (spans, 1, hidden).

    Stored per span and expanded at each use: expanded for the whole step they would need several times the memory
    of the tokens.
    """

    shift: Tensor
    scale: Tensor
    """1 + the network's scale."""
    gate: Tensor
    span_index: Tensor | None = None
    """(tokens,): the span that each token belongs to; `None` where each row of the batch is one span."""

    def modulate(self, tokens: Tensor, eps: float, workspace: Workspace) -> Tensor:
        """Returns LayerNorm(tokens) · scale + shift."""
        scale, shift = per_token(self.scale, self.span_index), per_token(self.shift, self.span_index)
        return modulated_norm(tokens, scale, shift, eps, workspace)

    def gate_residual(self, residual: Tensor, update: Tensor, workspace: Workspace) -> Tensor:
        """Returns residual + gate · update, in place outside autograd and compile."""
        gate = per_token(self.gate, self.span_index)
        return torch.addcmul(residual, gate, update, out=workspace.inplace(residual))


class StepModulation(NamedTuple):
    """All modulation of one step: everything that depends on its noise levels."""

    text: tuple[Modulation, ...]
    """Attention and feed-forward of the double-stream blocks, for text tokens."""
    image: tuple[Modulation, ...]
    """Attention and feed-forward of the double-stream blocks, for image tokens."""
    joint: Modulation
    """Single-stream blocks."""
    targets: Modulation
    """`joint`, indexed by target tokens."""
    head: tuple[Tensor, Tensor]
    """1 + scale, and shift, of the targets' last norm; each (spans, 1, hidden)."""


def modulations(per_span: Tensor, sublayers: int, span_index: Tensor | None = None) -> tuple[Modulation, ...]:
    """Splits a modulation layer's output (spans, 1, channels) into shift, scale and gate of each sublayer."""
    chunks = per_span.chunk(3 * sublayers, dim=-1)
    return tuple(
        Modulation(chunks[i], 1 + chunks[i + 1], chunks[i + 2], span_index) for i in range(0, len(chunks), 3)
    )


def per_token(per_span: Tensor, span_index: Tensor | None) -> Tensor:
    """Makes (spans, 1, channels) broadcastable to tokens: unchanged for a batch, else (1, tokens, channels)."""
    return per_span if span_index is None else per_span.index_select(0, span_index).transpose(0, 1)


def modulated_norm(tokens: Tensor, scale: Tensor, shift: Tensor, eps: float, workspace: Workspace) -> Tensor:
    """Returns LayerNorm(tokens) · scale + shift over the last axis."""
    normed = F.layer_norm(tokens, tokens.shape[-1:], eps=eps)
    return torch.addcmul(shift, normed, scale, out=workspace.inplace(normed))


class ModulationLayer(nn.Module):
    """Embeddings (spans, hidden) → (spans, chunks · hidden)."""

    __call__: Callable[..., Tensor]

    def __init__(self, hidden_size: int, chunks: int) -> None:
        super().__init__()
        self.linear = Linear(hidden_size, chunks * hidden_size)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.linear(F.silu(embedding))


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


class TimestepEmbedder(nn.Module):
    """Two linear layers with a SiLU between them."""

    __call__: Callable[..., Tensor]

    def __init__(self, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = Linear(channels, hidden_size)
        self.linear_2 = Linear(hidden_size, hidden_size)

    def forward(self, wave: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(wave)))


def effective_timesteps(sigmas: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns 1000·σ with the reference's rounding: cast to `dtype`, then divided and multiplied by 1000.

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
