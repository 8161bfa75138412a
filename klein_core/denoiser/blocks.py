"""The two kinds of transformer block.

Double-stream blocks give text and image tokens weights of their own and let them meet in attention.
Single-stream blocks run over both at once, with attention and feed-forward side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klein_core.denoiser.modulation import Modulation
from klein_core.denoiser.packing import Packing
from klein_core.denoiser.reference_cache import CachedLayer
from klein_core.denoiser.rope import rotate
from klein_core.denoiser.workspace import Workspace
from klein_core.linear import Linear
from klein_core.variants import TransformerConfig

LARGEST_HALF = float(torch.finfo(torch.float16).max)


class Step(NamedTuple):
    """What all blocks of a step share, and what one layer's attention reads or leaves of references."""

    packing: Packing
    rotations: Tensor
    """(1 or batch, joint tokens, head_dim / 2, 2)."""
    scratch: Workspace
    cached: CachedLayer | None = None
    record: Tensor | None = None
    """(key or value, tokens, heads, head_dim): where this layer's keys and values go; only without a batch."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Does `Packing.attend`."""
        if self.record is not None:
            self.record[0].copy_(key[0])
            self.record[1].copy_(value[0])
        return self.packing.attend(query, key, value, self.cached)


class Targets(NamedTuple):
    """The target tokens among all joint tokens of a step."""

    tokens: Tensor
    """(batch, target tokens, hidden)."""
    rotations: Tensor
    """(1 or batch, target tokens, head_dim / 2, 2)."""
    modulation: Modulation


def swiglu(gate_and_value: Tensor, scratch: Workspace, out: Tensor | None = None) -> Tensor:
    """Returns silu(first half) · second half of the last axis, in `out` if that is given."""
    gate, value = gate_and_value.chunk(2, dim=-1)
    gate = F.silu(gate, inplace=scratch.may_overwrite)
    return torch.mul(gate, value, out=scratch.over(gate) if out is None else out)


def clipped(tokens: Tensor, scratch: Workspace) -> Tensor:
    """Returns float16 tokens without infinities, which the next norm would turn to NaN; others as they are.

    Where diffusers' `Flux2TransformerBlock` and `Flux2SingleTransformerBlock` do the same: on what leaves a block,
    but not on the image tokens of a double-stream block.
    """
    if tokens.dtype != torch.float16:
        return tokens
    return torch.clamp(tokens, -LARGEST_HALF, LARGEST_HALF, out=scratch.over(tokens))


def normalized_heads(heads: Tensor, weight: Tensor, eps: float, scratch: Workspace) -> Tensor:
    """Root-mean-square norm over head_dim, in fp32.

    Args:
        heads: (batch, tokens, …, head_dim); overwritten if that may be and it is fp32.
        weight: broadcastable to heads.
    """
    heads = heads.float()
    length = torch.linalg.vector_norm(heads, dim=-1, keepdim=True)
    inverse = torch.rsqrt(length.square() / heads.shape[-1] + eps)
    scaled = torch.mul(heads, inverse, out=scratch.over(heads))
    return torch.mul(scaled, weight.float(), out=scratch.over(scaled))


class HeadNorm(nn.Module):
    """The learned scale of a query or key norm; applied by `normalized_heads`."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))


def stacked(query_norm: HeadNorm, key_norm: HeadNorm) -> Tensor:
    """Returns both weights as (2, 1, head_dim), to go with (…, query or key, heads, head_dim)."""
    return torch.stack([query_norm.weight, key_norm.weight])[:, None]


class FeedForward(nn.Module):
    """SwiGLU feed-forward: hidden → 2 · inner → inner → hidden."""

    __call__: Callable[..., Tensor]

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.linear_in = Linear(hidden_size, 2 * inner_size)
        self.linear_out = Linear(inner_size, hidden_size)

    def forward(self, tokens: Tensor, scratch: Workspace) -> Tensor:
        buffer = scratch.take("projection", tokens, self.linear_in.out_features)
        return self.linear_out(swiglu(self.linear_in(tokens, buffer), scratch))


class JointAttention(nn.Module):
    """Attention over text and image tokens, each with projections of its own."""

    __call__: Callable[..., tuple[Tensor, Tensor]]

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden_size, head_dim = config.hidden_size, config.attention_head_dim
        self.head_dim, self.eps = head_dim, config.eps
        self.to_qkv = Linear(hidden_size, 3 * hidden_size)
        self.to_added_qkv = Linear(hidden_size, 3 * hidden_size)
        self.norm_q, self.norm_k = HeadNorm(head_dim), HeadNorm(head_dim)
        self.norm_added_q, self.norm_added_k = HeadNorm(head_dim), HeadNorm(head_dim)
        self.to_out = nn.ModuleList([Linear(hidden_size, hidden_size)])
        self.to_add_out = Linear(hidden_size, hidden_size)

    def forward(self, text: Tensor, image: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        text_qkv = torch.unflatten(self.to_added_qkv(text), -1, (3, -1, self.head_dim))
        image_qkv = torch.unflatten(self.to_qkv(image), -1, (3, -1, self.head_dim))
        text_weight, image_weight = (
            stacked(self.norm_added_q, self.norm_added_k),
            stacked(self.norm_q, self.norm_k),
        )
        query_key = step.packing.join(
            normalized_heads(text_qkv[:, :, :2], text_weight, self.eps, step.scratch),
            normalized_heads(image_qkv[:, :, :2], image_weight, self.eps, step.scratch),
        )
        query, key = rotate(query_key, step.rotations, step.scratch).to(image.dtype).unbind(2)
        value = step.packing.join(text_qkv[:, :, 2], image_qkv[:, :, 2])
        attended = step.attend(query, key, value)
        text_attended, image_attended = step.packing.split(attended, text.shape[1])
        return self.to_add_out(text_attended), self.to_out[0](image_attended)


class DoubleStreamBlock(nn.Module):
    """A block of the first part, from and to text and image tokens of (batch, tokens, hidden)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        inner_size = int(config.hidden_size * config.mlp_ratio)
        self.eps = config.eps
        self.attn = JointAttention(config)
        self.ff = FeedForward(config.hidden_size, inner_size)
        self.ff_context = FeedForward(config.hidden_size, inner_size)

    def forward(
        self,
        text: Tensor,
        image: Tensor,
        text_modulations: tuple[Modulation, ...],
        image_modulations: tuple[Modulation, ...],
        step: Step,
    ) -> tuple[Tensor, Tensor]:
        scratch = step.scratch
        (of_text, text_inner), (of_image, image_inner) = text_modulations, image_modulations
        text_update, image_update = self.attn(
            of_text.enter(text, self.eps, scratch), of_image.enter(image, self.eps, scratch), step
        )
        text = of_text.leave(text, text_update, scratch)
        image = of_image.leave(image, image_update, scratch)
        text_update = self.ff_context(text_inner.enter(text, self.eps, scratch), scratch)
        image_update = self.ff(image_inner.enter(image, self.eps, scratch), scratch)
        text = clipped(text_inner.leave(text, text_update, scratch), scratch)
        return text, image_inner.leave(image, image_update, scratch)


class ParallelAttention(nn.Module):
    """Attention and feed-forward from one projection, and back through one."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden_size, inner_size = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.head_dim, self.eps = config.attention_head_dim, config.eps
        self.widths = [3 * hidden_size, 2 * inner_size]
        self.to_qkv_mlp_proj = Linear(hidden_size, sum(self.widths))
        self.norm_q, self.norm_k = HeadNorm(self.head_dim), HeadNorm(self.head_dim)
        self.to_out = Linear(hidden_size + inner_size, hidden_size)

    def forward(self, tokens: Tensor, step: Step) -> Tensor:
        """Returns the update (batch, tokens, hidden) of all tokens."""
        buffer = step.scratch.take("projection", tokens, sum(self.widths))
        qkv, feed_forward = torch.split(self.to_qkv_mlp_proj(tokens, buffer), self.widths, dim=-1)
        qkv = torch.unflatten(qkv, -1, (3, -1, self.head_dim))
        weight = stacked(self.norm_q, self.norm_k)
        query_key = normalized_heads(qkv[:, :, :2], weight, self.eps, step.scratch)
        query, key = rotate(query_key, step.rotations, step.scratch).to(tokens.dtype).unbind(2)
        return self.merge(query, key, qkv[:, :, 2], feed_forward, step)

    def of_targets(self, tokens: Tensor, targets: Tensor, target_rotations: Tensor, step: Step) -> Tensor:
        """Returns the update (batch, target tokens, hidden) of `targets`, which attend to all of `tokens`."""
        queries_end, attention_end, end = self.widths[0] // 3, self.widths[0], sum(self.widths)
        projection = self.to_qkv_mlp_proj
        query = torch.unflatten(projection.rows(targets, 0, queries_end), -1, (-1, self.head_dim))
        key_value = projection.rows(tokens, queries_end, attention_end)
        key, value = torch.unflatten(key_value, -1, (2, -1, self.head_dim)).unbind(2)
        feed_forward = projection.rows(targets, attention_end, end)
        query = normalized_heads(query, self.norm_q.weight, self.eps, step.scratch)
        key = normalized_heads(key, self.norm_k.weight, self.eps, step.scratch)
        query = rotate(query, target_rotations, step.scratch).to(tokens.dtype)
        key = rotate(key, step.rotations, step.scratch).to(tokens.dtype)
        return self.merge(query, key, value, feed_forward, step)

    def merge(self, query: Tensor, key: Tensor, value: Tensor, feed_forward: Tensor, step: Step) -> Tensor:
        """Attends, activates the feed-forward, and projects both back to (batch, query's tokens, hidden)."""
        attended = step.attend(query, key, value)
        merged = step.scratch.take("merged", feed_forward, self.to_out.in_features)
        if merged is None:
            return self.to_out(torch.cat([attended, swiglu(feed_forward, step.scratch)], dim=-1))
        channels = attended.shape[-1]
        merged[..., :channels] = attended
        swiglu(feed_forward, step.scratch, out=merged[..., channels:])
        return self.to_out(merged)


class SingleStreamBlock(nn.Module):
    """A block of the second part, from and to joint tokens of (batch, tokens, hidden)."""

    __call__: Callable[..., Tensor]

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn = ParallelAttention(config)

    def forward(self, tokens: Tensor, modulation: Modulation, step: Step) -> Tensor:
        update = self.attn(modulation.enter(tokens, self.eps, step.scratch), step)
        return clipped(modulation.leave(tokens, update, step.scratch), step.scratch)


class FinalSingleStreamBlock(SingleStreamBlock):
    """The last block: nobody reads its text and reference tokens, so it computes the targets alone."""

    def forward(  # type: ignore[override]
        self, tokens: Tensor, targets: Targets, modulation: Modulation, step: Step
    ) -> Tensor:
        """Returns (batch, target tokens, hidden)."""
        update = self.attn.of_targets(
            modulation.enter(tokens, self.eps, step.scratch),
            targets.modulation.enter(targets.tokens, self.eps, step.scratch),
            targets.rotations,
            step,
        )
        return clipped(targets.modulation.leave(targets.tokens, update, step.scratch), step.scratch)
