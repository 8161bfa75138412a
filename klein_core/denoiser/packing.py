"""How the tokens of several spans lie side by side.

Spans of equal lengths are a batch: (spans, tokens, channels). Other mixes are laid end to end in a batch of
one: (1, all tokens, channels). Either way a per-span value broadcasts against tokens, so blocks do not know
which it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from klein_core.denoiser.span import Span


@dataclass(frozen=True)
class Packing:
    """Token counts of each span of a step, in the order in which they are laid."""

    text_lengths: tuple[int, ...]
    target_lengths: tuple[int, ...]
    image_lengths: tuple[int, ...]
    """Target and reference tokens."""
    joint_lengths: tuple[int, ...]
    """Text and image tokens."""
    is_batch: bool
    """Whether all spans have the same lengths."""

    @classmethod
    def of(cls, spans: Sequence[Span]) -> Packing:
        """Lays spans in the order given; equal ones should be neighbours, to share attention calls."""
        lengths = [(span.text_length, span.target_length, span.image_length) for span in spans]
        text, target, image = zip(*lengths, strict=True)
        joint = tuple(t + i for t, i in zip(text, image, strict=True))
        return cls(text, target, image, joint, is_batch=len(set(lengths)) == 1)

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """Lays (tokens_i, …) tensors, one a span, into (batch, tokens, …)."""
        if len(parts) == 1:
            return parts[0][None]
        return torch.stack(list(parts)) if self.is_batch else torch.cat(list(parts))[None]

    def unpack(self, tokens: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Undoes `pack`: (batch, tokens, …) → one (tokens_i, …) a span."""
        return list(tokens.unbind(0) if self.is_batch else torch.split(tokens[0], list(lengths)))

    def spread(self, per_span: Tensor, lengths: Sequence[int]) -> Tensor:
        """Makes (spans, channels) broadcastable to tokens: (spans, 1, channels) or (1, tokens, channels)."""
        if self.is_batch:
            return per_span[:, None]
        return per_span.repeat_interleave(torch.tensor(lengths, device=per_span.device), dim=0)[None]

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        """Puts each span's text in front of its image tokens."""
        return torch.cat([text, image], dim=1) if self.is_batch else self._interleave(text, image)

    def split(self, joint: Tensor, text_length: int) -> tuple[Tensor, Tensor]:
        """Undoes `join`; `text_length` is that of the text tensor's token axis."""
        if self.is_batch:
            return joint[:, :text_length], joint[:, text_length:]
        separate: tuple[Tensor, Tensor] = self._separate(joint)
        return separate

    def targets(self, joint: Tensor) -> Tensor:
        """Picks the target's tokens of each span: (batch, target tokens, …)."""
        if self.is_batch:
            start = self.text_lengths[0]
            return joint[:, start : start + self.target_lengths[0]]
        spans = zip(
            self.unpack(joint, self.joint_lengths), self.text_lengths, self.target_lengths, strict=True
        )
        return torch.cat([tokens[text : text + target] for tokens, text, target in spans])[None]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Full attention inside each span.

        Args:
            query: (batch, tokens, heads, head_dim): joint tokens, or the targets only.
            key, value: (batch, joint tokens, heads, head_dim).

        Returns:
            (batch, query's tokens, heads · head_dim).
        """
        return attention(query, key, value) if self.is_batch else self._attend_each(query, key, value)

    def _interleave(self, text: Tensor, image: Tensor) -> Tensor:
        texts, images = (
            torch.split(text, list(self.text_lengths), dim=1),
            torch.split(image, list(self.image_lengths), dim=1),
        )
        return torch.cat([part for pair in zip(texts, images, strict=True) for part in pair], dim=1)

    def _separate(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        lengths = [n for pair in zip(self.text_lengths, self.image_lengths, strict=True) for n in pair]
        parts = torch.split(joint, lengths, dim=1)
        return torch.cat(parts[::2], dim=1), torch.cat(parts[1::2], dim=1)

    def _attend_each(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        is_joint = query.shape[1] == key.shape[1]
        query_lengths = self.joint_lengths if is_joint else self.target_lengths
        pieces = zip(
            _runs(query, query_lengths, self.joint_lengths),
            *(_runs(tensor, self.joint_lengths, query_lengths) for tensor in (key, value)),
            strict=True,
        )
        return torch.cat([attention(*trio).flatten(0, 1) for trio in pieces])[None]


def keep_from_compiler() -> None:
    """Lets compiled blocks call what depends on a mix's lengths instead of compiling it.

    Lengths are Python numbers there: each new mix would be a new program. Not a decorator, because that imports the
    compiler, which takes seconds that only compiled blocks are worth.
    """
    for name in ("_interleave", "_separate", "_attend_each"):
        method = getattr(Packing, name)
        if not getattr(method, "_torchdynamo_disable", False):
            setattr(Packing, name, torch.compiler.disable(method))  # type: ignore[no-untyped-call]


def _runs(tokens: Tensor, lengths: Sequence[int], others: Sequence[int]) -> list[Tensor]:
    """Cuts (1, tokens, …) into batches of neighbours that agree in both lengths: (spans, tokens, …) each."""
    runs = [(pair[0], len(list(run))) for pair, run in groupby(zip(lengths, others, strict=True))]
    pieces = torch.split(tokens[0], [length * count for length, count in runs])
    return [
        torch.unflatten(piece, 0, (count, length))
        for piece, (length, count) in zip(pieces, runs, strict=True)
    ]


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention, scaled by 1/√head_dim.

    Args:
        query: (batch, query tokens, heads, head_dim).
        key, value: (batch, tokens, heads, head_dim).

    Returns:
        (batch, query tokens, heads · head_dim).
    """
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
