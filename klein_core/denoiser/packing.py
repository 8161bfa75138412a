"""How the tokens of several spans lie side by side.

Spans of equal lengths are a batch: (spans, tokens, channels). Other mixes are laid end to end in a batch of one:
(1, all tokens, channels). Either way a per-span value broadcasts against tokens, so blocks do not know which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Token counts of each span of a step, in the order in which they are laid."""

    text_lengths: tuple[int, ...]
    image_lengths: tuple[int, ...]

    @property
    def is_batch(self) -> bool:
        """Whether all spans have the same lengths."""
        return len(set(zip(self.text_lengths, self.image_lengths, strict=True))) == 1

    @property
    def joint_lengths(self) -> tuple[int, ...]:
        """Text and image tokens of each span together."""
        return tuple(text + image for text, image in zip(self.text_lengths, self.image_lengths, strict=True))

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """Lays (tokens_i, …) tensors, one a span, into (batch, tokens, …)."""
        if len(parts) == 1:
            return parts[0][None]
        return torch.stack(list(parts)) if self.is_batch else torch.cat(list(parts))[None]

    def unpack(self, tokens: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Undoes `pack`: (batch, tokens, …) → one (tokens_i, …) a span."""
        return list(tokens.unbind(0) if self.is_batch else tokens[0].split(list(lengths)))

    def spread(self, per_span: Tensor, lengths: Sequence[int]) -> Tensor:
        """Makes (spans, channels) broadcastable to tokens: (spans, 1, channels) or (1, tokens, channels)."""
        if self.is_batch:
            return per_span[:, None]
        return per_span.repeat_interleave(torch.tensor(lengths, device=per_span.device), dim=0)[None]

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        """Puts each span's text in front of its image tokens."""
        if self.is_batch:
            return torch.cat([text, image], dim=1)
        texts, images = text.split(self.text_lengths, dim=1), image.split(self.image_lengths, dim=1)
        return torch.cat([part for pair in zip(texts, images, strict=True) for part in pair], dim=1)

    def split(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """Undoes `join`."""
        if self.is_batch:
            text, image = joint.split([self.text_lengths[0], self.image_lengths[0]], dim=1)
            return text, image
        lengths = [n for pair in zip(self.text_lengths, self.image_lengths, strict=True) for n in pair]
        parts = joint.split(lengths, dim=1)
        return torch.cat(parts[::2], dim=1), torch.cat(parts[1::2], dim=1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Full attention inside each span.

        Args:
            query, key, value: (batch, joint tokens, heads, head_dim).

        Returns:
            (batch, joint tokens, heads · head_dim).
        """
        if self.is_batch:
            return attention(query, key, value)
        runs = [(length, len(list(run))) for length, run in groupby(self.joint_lengths)]
        sizes = [length * count for length, count in runs]
        pieces = zip(*(tensor[0].split(sizes) for tensor in (query, key, value)), strict=True)
        attended = [
            attention(*(piece.unflatten(0, (count, length)) for piece in trio)).flatten(0, 1)
            for (length, count), trio in zip(runs, pieces, strict=True)
        ]
        return torch.cat(attended)[None]


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention, scaled by 1/√head_dim: (batch, tokens, heads, head_dim) → (batch, tokens, channels)."""
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2).flatten(2)
