"""One image's share of a packed step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from klein_core.denoiser.adapters.adapter import ScaledAdapter
from klein_core.denoiser.reference_cache import CachedLayer, ReferenceCache, cache_shape
from klein_core.errors import InvalidInput, Violation
from klein_core.linear import Linear
from klein_core.variants import TransformerConfig

_Wanted = tuple[str, Tensor, int, int]
"""Name, tensor, axes, channels."""


@dataclass(frozen=True, eq=False)
class Span:
    """What the transformer sees of one image at one moment: text, the noisy target, clean references."""

    prompt_embedding: Tensor
    """(text tokens, joint attention channels). Padding rows are attended like any other."""
    latents: Tensor
    """(rows, columns, channels): the noisy target."""
    references: tuple[Tensor, ...] = ()
    """(rows, columns, channels) each, of any size, in the order the prompt counts them."""
    sigma: float = 1.0
    """Noise level of `latents` in 0…1."""
    reference_cache: ReferenceCache | None = None
    """In place of `references`, for models that take them so."""
    adapters: tuple[ScaledAdapter, ...] = ()
    """What is added to the network's products for this image alone."""

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the target, then of each reference."""
        return tuple((image.shape[0], image.shape[1]) for image in (self.latents, *self.references))

    @property
    def text_length(self) -> int:
        """Tokens of the prompt embedding."""
        return self.prompt_embedding.shape[0]

    @property
    def target_length(self) -> int:
        """Tokens of the target image."""
        return self.latents.shape[0] * self.latents.shape[1]

    @property
    def image_length(self) -> int:
        """Tokens of the target and all references."""
        return sum(rows * columns for rows, columns in self.grids)

    @property
    def cached_length(self) -> int:
        """Tokens of the references that are cached."""
        return 0 if self.reference_cache is None else self.reference_cache.token_count

    def check(self, config: TransformerConfig) -> None:
        """Compares shapes with the model's.

        Raises:
            InvalidInput: a tensor has the wrong number of axes or channels, or no tokens; or references are
                there twice, as tokens and as a cache.
        """
        wanted = [("prompt_embedding", self.prompt_embedding, 2, config.joint_attention_dim)]
        wanted.append(("latents", self.latents, 3, config.in_channels))
        violations = list(_shape_violations([*wanted, *_wanted_references(self.references, config)]))
        violations += self._cache_violations(config)
        if violations:
            raise InvalidInput(violations)

    def _cache_violations(self, config: TransformerConfig) -> list[Violation]:
        if self.reference_cache is None:
            return []
        violations = []
        shape, wanted = self.reference_cache.keys_values.shape, cache_shape(config, self.cached_length)
        if shape != wanted:
            violations.append(
                Violation("reference_cache", f"has shape {tuple(shape)}; this model's is {wanted}")
            )
        if self.references:
            violations.append(Violation("references", "must be empty beside a reference_cache"))
        return violations


def check_references(references: Sequence[Tensor], config: TransformerConfig) -> None:
    """Compares references with what the model takes.

    Raises:
        InvalidInput: there are none, or a tensor has the wrong number of axes or channels, or no tokens.
    """
    if not references:
        raise InvalidInput.of("references", "are none; at least 1")
    violations = list(_shape_violations(_wanted_references(references, config)))
    if violations:
        raise InvalidInput(violations)


def _wanted_references(references: Sequence[Tensor], config: TransformerConfig) -> list[_Wanted]:
    return [(f"references[{i}]", r, 3, config.in_channels) for i, r in enumerate(references)]


def _shape_violations(wanted: Sequence[_Wanted]) -> Iterator[Violation]:
    for name, tensor, axes, channels in wanted:
        if tensor.ndim != axes or tensor.shape[-1] != channels or tensor.numel() == 0:
            yield Violation(
                name, f"has shape {tuple(tensor.shape)}; {axes} non-empty axes, the last of {channels}"
            )


_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Packing:
    """Token counts of each span of a step, in the order in which they are laid."""

    text_lengths: tuple[int, ...]
    target_lengths: tuple[int, ...]
    image_lengths: tuple[int, ...]
    """Target and reference tokens."""
    joint_lengths: tuple[int, ...]
    """Text and image tokens."""
    cached_lengths: tuple[int, ...]
    """Reference tokens that are attended to though they are not laid, because their keys and values are cached."""
    is_batch: bool
    """Whether all spans have the same lengths."""

    @classmethod
    def of(cls, spans: Sequence[Span]) -> Packing:
        """Lays spans in the order given; equal ones should be neighbors, to share attention calls."""
        lengths = [
            (span.text_length, span.target_length, span.image_length, span.cached_length) for span in spans
        ]
        text, target, image, cached = zip(*lengths, strict=True)
        joint = tuple(t + i for t, i in zip(text, image, strict=True))
        return cls(text, target, image, joint, cached, is_batch=len(set(lengths)) == 1)

    @classmethod
    def of_references(cls, token_count: int) -> Packing:
        """Lays the references of one image alone: no text, and no target that would need the last layer."""
        return cls((0,), (0,), (token_count,), (token_count,), (0,), is_batch=True)

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """Lays (tokens_i, …) tensors, one a span, into (batch, tokens, …)."""
        if len(parts) == 1:
            return parts[0][None]
        return torch.stack(list(parts)) if self.is_batch else torch.cat(list(parts))[None]

    def unpack(self, tokens: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Undoes `pack`: (batch, tokens, …) → one (tokens_i, …) a span."""
        return list(tokens.unbind(0) if self.is_batch else torch.split(tokens[0], list(lengths)))

    def owners(self, device: torch.device) -> tuple[Tensor | None, ...]:
        """Returns the span of each text, image, joint and target token: (tokens,) each.

        `None` for a batch, where each row is a span's.
        """
        all_lengths = self.text_lengths, self.image_lengths, self.joint_lengths, self.target_lengths
        if self.is_batch:
            return (None,) * len(all_lengths)
        # Pinned, and with the sums told: neither the copy nor a count makes the processor wait for the device.
        counts = torch.tensor(all_lengths, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        spans = torch.arange(len(self.text_lengths), device=device)
        return tuple(
            spans.repeat_interleave(of_kind, output_size=sum(lengths))
            for of_kind, lengths in zip(counts.unbind(), all_lengths, strict=True)
        )

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

    def attend(self, query: Tensor, key: Tensor, value: Tensor, cached: CachedLayer | None = None) -> Tensor:
        """Full attention inside each span.

        Args:
            query: (batch, tokens, heads, head_dim): joint tokens, or the targets only.
            key, value: (batch, joint tokens, heads, head_dim).
            cached: further keys and values of each span; attention does not care where they stand.

        Returns:
            (batch, query's tokens, heads · head_dim).
        """
        if self.is_batch and cached is None:
            return attention(query, key, value)
        return self._attend_each(query, key, value, cached)

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

    def _attend_each(self, query: Tensor, key: Tensor, value: Tensor, cached: CachedLayer | None) -> Tensor:
        parts = [None] * len(self.joint_lengths) if cached is None else list(cached.parts)
        if self.is_batch:
            return attention(query, *_with_cached(key, value, parts))
        is_joint = query.shape[1] == key.shape[1]
        query_lengths = self.joint_lengths if is_joint else self.target_lengths
        counts = _run_counts(query_lengths, self.joint_lengths, self.cached_lengths)
        pieces = zip(
            _runs(query, query_lengths, counts),
            *(_runs(tensor, self.joint_lengths, counts) for tensor in (key, value)),
            _taken(parts, counts),
            strict=True,
        )
        return torch.cat([attention(q, *_with_cached(k, v, of)).flatten(0, 1) for q, k, v, of in pieces])[
            None
        ]


def keep_from_compiler() -> None:
    """Lets compiled blocks call what depends on a mix's lengths or adapters instead of compiling it.

    Lengths are Python numbers there: each new mix would be a new program. Not a decorator, because that imports the
    compiler, which takes seconds that only compiled blocks are worth.
    """
    of_lengths = ((Packing, "_interleave"), (Packing, "_separate"), (Packing, "_attend_each"))
    for owner, name in (*of_lengths, (Linear, "_adapt")):
        method = getattr(owner, name)
        if not getattr(method, "_torchdynamo_disable", False):
            setattr(owner, name, torch.compiler.disable(method))  # type: ignore[no-untyped-call]


def _run_counts(*lengths: Sequence[int]) -> list[int]:
    """Counts neighboring spans that agree in all lengths, run by run."""
    return [len(list(run)) for _, run in groupby(zip(*lengths, strict=True))]


def _runs(tokens: Tensor, lengths: Sequence[int], counts: Sequence[int]) -> list[Tensor]:
    """Cuts (1, tokens, …) into a batch for each run of equal spans: (spans, tokens, …) each."""
    run_lengths = [run[0] for run in _taken(lengths, counts)]
    sizes = [length * count for length, count in zip(run_lengths, counts, strict=True)]
    return [
        torch.unflatten(piece, 0, (count, length))
        for piece, length, count in zip(torch.split(tokens[0], sizes), run_lengths, counts, strict=True)
    ]


def _taken(items: Sequence[_Item], counts: Sequence[int]) -> list[list[_Item]]:
    """Cuts a sequence into lists of so many items."""
    left = iter(items)
    return [list(islice(left, count)) for count in counts]


def _with_cached(key: Tensor, value: Tensor, parts: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Appends to each span's keys and values, (spans, tokens, heads, head_dim), the cached ones."""
    cached = [part for part in parts if part is not None]
    if not cached:
        return key, value
    return _appended(key, [part[0] for part in cached]), _appended(value, [part[1] for part in cached])


def _appended(tokens: Tensor, further: Sequence[Tensor]) -> Tensor:
    """Appends (further tokens, …) to each span's (tokens, …), moving every value once."""
    spans, length = tokens.shape[:2]
    whole = tokens.new_empty(spans, length + further[0].shape[0], *tokens.shape[2:])
    whole[:, :length] = tokens
    for span, more in enumerate(further):
        whole[span, length:] = more
    return whole


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention, scaled by 1/√head_dim.

    Args:
        query: (batch, query tokens, heads, head_dim).
        key, value: (batch, tokens, heads, head_dim).

    Returns:
        (batch, query tokens, heads · head_dim).
    """
    if query.shape[1] == 0:
        return query.flatten(2)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
