"""The two kinds of transformer block.

Double-stream blocks give text and image tokens weights of their own and let them meet in attention.
Single-stream blocks run over both at once, with attention and feed-forward side by side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klein_core.denoiser.conditioning import Modulation
from klein_core.denoiser.linear import Linear
from klein_core.denoiser.packing import Packing
from klein_core.denoiser.positions import rotate
from klein_core.variants import TransformerConfig


def swiglu(gate_and_value: Tensor) -> Tensor:
    """Returns silu(first half) · second half of the last axis."""
    gate, value = gate_and_value.chunk(2, dim=-1)
    return F.silu(gate) * value


def normalised_heads(query_key: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of each query and key head, in fp32.

    Args:
        query_key: (batch, tokens, 2, heads, head_dim), queries first.
        query_weight, key_weight: (head_dim,).
    """
    heads = query_key.float()
    weight = torch.stack([query_weight, key_weight])[:, None].float()
    return heads * torch.rsqrt(heads.square().mean(dim=-1, keepdim=True) + eps) * weight


class HeadNorm(nn.Module):
    """The learned scale of a query or key norm; applied by `normalised_heads`."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))


class FeedForward(nn.Module):
    """SwiGLU feed-forward: hidden → 2 · inner → inner → hidden."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.linear_in = Linear(hidden_size, 2 * inner_size)
        self.linear_out = Linear(inner_size, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear_out(swiglu(self.linear_in(tokens)))


class JointAttention(nn.Module):
    """Attention over text and image tokens, each with projections of its own."""

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

    def forward(
        self, text: Tensor, image: Tensor, rotations: Tensor, packing: Packing
    ) -> tuple[Tensor, Tensor]:
        text_qkv = self.to_added_qkv(text).unflatten(-1, (3, -1, self.head_dim))
        image_qkv = self.to_qkv(image).unflatten(-1, (3, -1, self.head_dim))
        query_key = rotate(
            packing.join(
                normalised_heads(
                    text_qkv[:, :, :2], self.norm_added_q.weight, self.norm_added_k.weight, self.eps
                ),
                normalised_heads(image_qkv[:, :, :2], self.norm_q.weight, self.norm_k.weight, self.eps),
            ),
            rotations,
        ).to(image.dtype)
        value = packing.join(text_qkv[:, :, 2], image_qkv[:, :, 2])
        text, image = packing.split(packing.attend(query_key[:, :, 0], query_key[:, :, 1], value))
        return self.to_add_out(text), self.to_out[0](image)


class DoubleStreamBlock(nn.Module):
    """One block of the first part: (batch, text tokens, hidden) and (batch, image tokens, hidden) → the same."""

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
        rotations: Tensor,
        packing: Packing,
    ) -> tuple[Tensor, Tensor]:
        text_attention, text_feed_forward = text_modulations
        image_attention, image_feed_forward = image_modulations
        text_update, image_update = self.attn(
            text_attention.enter(text, self.eps), image_attention.enter(image, self.eps), rotations, packing
        )
        text = text_attention.leave(text, text_update)
        image = image_attention.leave(image, image_update)
        text = text_feed_forward.leave(text, self.ff_context(text_feed_forward.enter(text, self.eps)))
        image = image_feed_forward.leave(image, self.ff(image_feed_forward.enter(image, self.eps)))
        return text, image


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

    def forward(self, tokens: Tensor, rotations: Tensor, packing: Packing) -> Tensor:
        qkv, feed_forward = self.to_qkv_mlp_proj(tokens).split(self.widths, dim=-1)
        qkv = qkv.unflatten(-1, (3, -1, self.head_dim))
        query_key = normalised_heads(qkv[:, :, :2], self.norm_q.weight, self.norm_k.weight, self.eps)
        query, key = rotate(query_key, rotations).to(tokens.dtype).unbind(2)
        attended = packing.attend(query, key, qkv[:, :, 2])
        return self.to_out(torch.cat([attended, swiglu(feed_forward)], dim=-1))


class SingleStreamBlock(nn.Module):
    """One block of the second part: (batch, joint tokens, hidden) → the same."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn = ParallelAttention(config)

    def forward(self, tokens: Tensor, modulation: Modulation, rotations: Tensor, packing: Packing) -> Tensor:
        update = self.attn(modulation.enter(tokens, self.eps), rotations, packing)
        return modulation.leave(tokens, update)
