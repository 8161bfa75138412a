"""Transformer blocks: double-stream and single-stream.

Double-stream blocks have separate weights for text and image tokens, which share one attention. Single-stream blocks
process both with the same weights, with attention and feed-forward in parallel.
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
from klein_core.denoiser.rope import apply_rope
from klein_core.denoiser.workspace import Workspace
from klein_core.linear import Linear
from klein_core.variants import TransformerConfig

FLOAT16_MAX = float(torch.finfo(torch.float16).max)


class BlockContext(NamedTuple):
    """Inputs that all blocks of a step share, and one layer's part of the reference cache."""

    packing: Packing
    rope_table: Tensor
    """(1 or batch, joint tokens, head_dim / 2, 2)."""
    workspace: Workspace
    cached: CachedLayer | None = None
    """Keys and values to attend to in addition to the step's own."""
    record: Tensor | None = None
    """(key or value, tokens, heads, head_dim): receives this layer's keys and values; only for a single span."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Runs `Packing.attend`, after copying keys and values to `record` where it is set."""
        if self.record is not None:
            self.record[0].copy_(key[0])
            self.record[1].copy_(value[0])
        return self.packing.attend(query, key, value, self.cached)


class Targets(NamedTuple):
    """The target tokens among all joint tokens of a step."""

    tokens: Tensor
    """(batch, target tokens, hidden)."""
    rope_table: Tensor
    """(1 or batch, target tokens, head_dim / 2, 2)."""
    modulation: Modulation


class DoubleStreamBlock(nn.Module):
    """MM-DiT block: text and image have separate weights and share one attention."""

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
        context: BlockContext,
    ) -> tuple[Tensor, Tensor]:
        """Returns text and image tokens, (batch, tokens, hidden) as they came.

        Args:
            text, image: (batch, tokens, hidden).
            text_modulations, image_modulations: of attention, then of the feed-forward.
            context: of the step and the layer.
        """
        workspace = context.workspace
        (text_attn, text_ff), (image_attn, image_ff) = text_modulations, image_modulations
        text_update, image_update = self.attn(
            text_attn.modulate(text, self.eps, workspace),
            image_attn.modulate(image, self.eps, workspace),
            context,
        )
        text = text_attn.gate_residual(text, text_update, workspace)
        image = image_attn.gate_residual(image, image_update, workspace)
        text_update = self.ff_context(text_ff.modulate(text, self.eps, workspace), workspace)
        image_update = self.ff(image_ff.modulate(image, self.eps, workspace), workspace)
        text = clipped(text_ff.gate_residual(text, text_update, workspace), workspace)
        return text, image_ff.gate_residual(image, image_update, workspace)


class SingleStreamBlock(nn.Module):
    """Parallel block: attention and feed-forward share one input and one output projection."""

    __call__: Callable[..., Tensor]

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn = ParallelAttention(config)

    def forward(self, tokens: Tensor, modulation: Modulation, context: BlockContext) -> Tensor:
        """Returns joint tokens, (batch, tokens, hidden) as they came."""
        workspace = context.workspace
        update = self.attn(modulation.modulate(tokens, self.eps, workspace), context)
        return clipped(modulation.gate_residual(tokens, update, workspace), workspace)


class FinalSingleStreamBlock(SingleStreamBlock):
    """Last block: computes the target tokens only, because its text and reference tokens would be discarded."""

    def forward(  # type: ignore[override]
        self, tokens: Tensor, targets: Targets, modulation: Modulation, context: BlockContext
    ) -> Tensor:
        """Returns (batch, target tokens, hidden)."""
        workspace = context.workspace
        update = self.attn.forward_targets_only(
            modulation.modulate(tokens, self.eps, workspace),
            targets.modulation.modulate(targets.tokens, self.eps, workspace),
            targets.rope_table,
            context,
        )
        return clipped(targets.modulation.gate_residual(targets.tokens, update, workspace), workspace)


class JointAttention(nn.Module):
    """Attention over text and image tokens together, with separate projections for each."""

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

    def forward(self, text: Tensor, image: Tensor, context: BlockContext) -> tuple[Tensor, Tensor]:
        text_qkv = torch.unflatten(self.to_added_qkv(text), -1, (3, -1, self.head_dim))
        image_qkv = torch.unflatten(self.to_qkv(image), -1, (3, -1, self.head_dim))
        text_weight = stacked_weights(self.norm_added_q, self.norm_added_k)
        image_weight = stacked_weights(self.norm_q, self.norm_k)
        query_key = context.packing.join(
            normalized_heads(text_qkv[:, :, :2], text_weight, self.eps, context.workspace),
            normalized_heads(image_qkv[:, :, :2], image_weight, self.eps, context.workspace),
        )
        query, key = apply_rope(query_key, context.rope_table, context.workspace).to(image.dtype).unbind(2)
        value = context.packing.join(text_qkv[:, :, 2], image_qkv[:, :, 2])
        attended = context.attend(query, key, value)
        text_attended, image_attended = context.packing.split(attended, text.shape[1])
        return self.to_add_out(text_attended), self.to_out[0](image_attended)


class ParallelAttention(nn.Module):
    """Attention and feed-forward in parallel, with a fused input projection and a fused output projection."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden_size, inner_size = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.head_dim, self.eps = config.attention_head_dim, config.eps
        self.widths = [3 * hidden_size, 2 * inner_size]
        self.to_qkv_mlp_proj = Linear(hidden_size, sum(self.widths))
        self.norm_q, self.norm_k = HeadNorm(self.head_dim), HeadNorm(self.head_dim)
        self.to_out = Linear(hidden_size + inner_size, hidden_size)

    def forward(self, tokens: Tensor, context: BlockContext) -> Tensor:
        """Returns the update (batch, tokens, hidden) of all tokens."""
        buffer = context.workspace.buffer("projection", tokens, sum(self.widths))
        qkv, feed_forward = torch.split(self.to_qkv_mlp_proj(tokens, buffer), self.widths, dim=-1)
        qkv = torch.unflatten(qkv, -1, (3, -1, self.head_dim))
        weight = stacked_weights(self.norm_q, self.norm_k)
        query_key = normalized_heads(qkv[:, :, :2], weight, self.eps, context.workspace)
        query, key = apply_rope(query_key, context.rope_table, context.workspace).to(tokens.dtype).unbind(2)
        return self.merge(query, key, qkv[:, :, 2], feed_forward, context)

    def forward_targets_only(
        self, tokens: Tensor, targets: Tensor, target_rope_table: Tensor, context: BlockContext
    ) -> Tensor:
        """Returns the update (batch, target tokens, hidden) of `targets`, which attend to all of `tokens`."""
        queries_end, attention_end, end = self.widths[0] // 3, self.widths[0], sum(self.widths)
        projection = self.to_qkv_mlp_proj
        query = torch.unflatten(projection.rows(targets, 0, queries_end), -1, (-1, self.head_dim))
        key_value = projection.rows(tokens, queries_end, attention_end)
        key, value = torch.unflatten(key_value, -1, (2, -1, self.head_dim)).unbind(2)
        feed_forward = projection.rows(targets, attention_end, end)
        query = normalized_heads(query, self.norm_q.weight, self.eps, context.workspace)
        key = normalized_heads(key, self.norm_k.weight, self.eps, context.workspace)
        query = apply_rope(query, target_rope_table, context.workspace).to(tokens.dtype)
        key = apply_rope(key, context.rope_table, context.workspace).to(tokens.dtype)
        return self.merge(query, key, value, feed_forward, context)

    def merge(
        self, query: Tensor, key: Tensor, value: Tensor, feed_forward: Tensor, context: BlockContext
    ) -> Tensor:
        """Attends, activates the feed-forward, and projects both to the update (batch, query's tokens, hidden)."""
        attended = context.attend(query, key, value)
        merged = context.workspace.buffer("merged", feed_forward, self.to_out.in_features)
        if merged is None:
            return self.to_out(torch.cat([attended, swiglu(feed_forward, context.workspace)], dim=-1))
        channels = attended.shape[-1]
        merged[..., :channels] = attended
        swiglu(feed_forward, context.workspace, out=merged[..., channels:])
        return self.to_out(merged)


class FeedForward(nn.Module):
    """SwiGLU feed-forward: hidden → 2 · inner → inner → hidden."""

    __call__: Callable[..., Tensor]

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.linear_in = Linear(hidden_size, 2 * inner_size)
        self.linear_out = Linear(inner_size, hidden_size)

    def forward(self, tokens: Tensor, workspace: Workspace) -> Tensor:
        buffer = workspace.buffer("projection", tokens, self.linear_in.out_features)
        return self.linear_out(swiglu(self.linear_in(tokens, buffer), workspace))


class HeadNorm(nn.Module):
    """Learned scale of a query or key norm; applied by `normalized_heads`."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))


def stacked_weights(query_norm: HeadNorm, key_norm: HeadNorm) -> Tensor:
    """Returns both weights as (2, 1, head_dim), broadcastable to (…, query or key, heads, head_dim)."""
    return torch.stack([query_norm.weight, key_norm.weight])[:, None]


def normalized_heads(heads: Tensor, weight: Tensor, eps: float, workspace: Workspace) -> Tensor:
    """Returns the root-mean-square norm over head_dim, in fp32.

    Args:
        heads: (batch, tokens, …, head_dim); overwritten if it is fp32 and the workspace allows it.
        weight: broadcastable to heads.
        eps: added to the mean square.
        workspace: of the step.
    """
    heads = heads.float()
    length = torch.linalg.vector_norm(heads, dim=-1, keepdim=True)
    inverse = torch.rsqrt(length.square() / heads.shape[-1] + eps)
    scaled = torch.mul(heads, inverse, out=workspace.inplace(heads))
    return torch.mul(scaled, weight.float(), out=workspace.inplace(scaled))


def swiglu(gate_and_value: Tensor, workspace: Workspace, out: Tensor | None = None) -> Tensor:
    """Returns silu(first half) · second half of the last axis, in `out` if that is given."""
    gate, value = gate_and_value.chunk(2, dim=-1)
    gate = F.silu(gate, inplace=workspace.allows_inplace)
    return torch.mul(gate, value, out=workspace.inplace(gate) if out is None else out)


def clipped(tokens: Tensor, workspace: Workspace) -> Tensor:
    """Clamps float16 tokens to the finite range, because the next norm would turn infinity to NaN.

    Other dtypes are returned unchanged. Source: diffusers' `Flux2TransformerBlock` and `Flux2SingleTransformerBlock`,
    which clamp a block's output, except for the image tokens of a double-stream block.
    """
    if tokens.dtype != torch.float16:
        return tokens
    return torch.clamp(tokens, -FLOAT16_MAX, FLOAT16_MAX, out=workspace.inplace(tokens))
