"""Packing of several images' tokens into one step: the spans, their layout, and attention inside each of them."""

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

_Item = TypeVar("_Item")


@dataclass(frozen=True, eq=False)
class Span:
    """One image's input to one step: text, the noisy target and clean references."""

    prompt_embedding: Tensor
    """(text tokens, joint attention channels). Padding rows are attended to like any other."""
    latents: Tensor
    """(rows, columns, channels): the noisy target."""
    references: tuple[Tensor, ...] = ()
    """(rows, columns, channels) each, of any size, in the order in which the prompt counts them."""
    sigma: float = 1.0
    """Noise level of `latents` in 0…1."""
    reference_cache: ReferenceCache | None = None
    """Replaces `references`, for models of the reference-cache kind."""
    adapters: tuple[ScaledAdapter, ...] = ()
    """Applied to this image's tokens only."""

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
        """Tokens of the cached references."""
        return 0 if self.reference_cache is None else self.reference_cache.token_count

    def check(self, config: TransformerConfig) -> None:
        """Validates shapes against the model's.

        Raises:
            InvalidInput: a tensor has the wrong number of axes or channels, or no tokens; or both references and a
                reference cache are given.
        """
        prompt_embedding = self.prompt_embedding
        violations = [
            *_shape_violations("prompt_embedding", prompt_embedding, 2, config.joint_attention_dim),
            *_shape_violations("latents", self.latents, 3, config.in_channels),
            *_reference_violations(self.references, config),
        ]
        if self.reference_cache is not None:
            shape = self.reference_cache.keys_values.shape
            wanted = cache_shape(config, self.cached_length)
            if shape != wanted:
                problem = f"has shape {tuple(shape)}; this model's is {wanted}"
                violations.append(Violation("reference_cache", problem))
            if self.references:
                violations.append(Violation("references", "must be empty when a reference_cache is given"))
        if violations:
            raise InvalidInput(violations)


def check_references(references: Sequence[Tensor], config: TransformerConfig) -> None:
    """Validates references against the model's shapes.

    Raises:
        InvalidInput: there are none, or a tensor has the wrong number of axes or channels, or no tokens.
    """
    if not references:
        raise InvalidInput.of("references", "must have at least 1 entry")
    violations = list(_reference_violations(references, config))
    if violations:
        raise InvalidInput(violations)


def _reference_violations(references: Sequence[Tensor], config: TransformerConfig) -> Iterator[Violation]:
    for index, reference in enumerate(references):
        yield from _shape_violations(f"references[{index}]", reference, 3, config.in_channels)


def _shape_violations(name: str, tensor: Tensor, axes: int, channels: int) -> Iterator[Violation]:
    if tensor.ndim != axes or tensor.shape[-1] != channels or tensor.numel() == 0:
        problem = f"has shape {tuple(tensor.shape)}; must have {axes} non-empty axes, the last of {channels}"
        yield Violation(name, problem)


@dataclass(frozen=True)
class Packing:
    """Layout of a step's spans: the token counts of each, in order."""

    text_lengths: tuple[int, ...]
    target_lengths: tuple[int, ...]
    image_lengths: tuple[int, ...]
    """Target and reference tokens."""
    joint_lengths: tuple[int, ...]
    """Text and image tokens."""
    cached_lengths: tuple[int, ...]
    """Reference tokens whose keys and values are cached: attended to, but not computed in the step."""
    is_batch: bool
    """Whether all spans have the same lengths."""

    @classmethod
    def of(cls, spans: Sequence[Span]) -> Packing:
        """Packs spans in the given order; equal ones should be neighbors, to share attention calls."""
        lengths = [
            (span.text_length, span.target_length, span.image_length, span.cached_length) for span in spans
        ]
        text, target, image, cached = zip(*lengths, strict=True)
        joint = tuple(t + i for t, i in zip(text, image, strict=True))
        return cls(text, target, image, joint, cached, is_batch=len(set(lengths)) == 1)

    @classmethod
    def of_references(cls, token_count: int) -> Packing:
        """Packs one image's references alone, without text or target tokens."""
        return cls((0,), (0,), (token_count,), (token_count,), (0,), is_batch=True)

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """Packs (tokens_i, …) tensors, one for each span, into (batch, tokens, …)."""
        if len(parts) == 1:
            return parts[0][None]
        return torch.stack(list(parts)) if self.is_batch else torch.cat(list(parts))[None]

    def unpack(self, tokens: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Undoes `pack`: (batch, tokens, …) → one (tokens_i, …) for each span."""
        return list(tokens.unbind(0) if self.is_batch else torch.split(tokens[0], list(lengths)))

    def span_index(self, device: torch.device) -> tuple[Tensor | None, ...]:
        """Returns the span ("segment id") of each text, image, joint and target token: (tokens,) each.

        `None` for a batch, where each row is one span.
        """
        all_lengths = self.text_lengths, self.image_lengths, self.joint_lengths, self.target_lengths
        if self.is_batch:
            return (None,) * len(all_lengths)
        # Pinned memory and explicit output sizes: the CPU never waits for the device.
        counts = torch.tensor(all_lengths, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        spans = torch.arange(len(self.text_lengths), device=device)
        return tuple(
            spans.repeat_interleave(of_kind, output_size=sum(lengths))
            for of_kind, lengths in zip(counts.unbind(), all_lengths, strict=True)
        )

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        """Concatenates each span's text and image tokens, text first."""
        return torch.cat([text, image], dim=1) if self.is_batch else self._interleave(text, image)

    def split(self, joint: Tensor, text_length: int) -> tuple[Tensor, Tensor]:
        """Undoes `join`; `text_length` is the text tensor's number of tokens."""
        if self.is_batch:
            return joint[:, :text_length], joint[:, text_length:]
        separate: tuple[Tensor, Tensor] = self._separate(joint)
        return separate

    def targets(self, joint: Tensor) -> Tensor:
        """Selects each span's target tokens: (batch, target tokens, …)."""
        if self.is_batch:
            start = self.text_lengths[0]
            return joint[:, start : start + self.target_lengths[0]]
        spans = zip(
            self.unpack(joint, self.joint_lengths), self.text_lengths, self.target_lengths, strict=True
        )
        return torch.cat([tokens[text : text + target] for tokens, text, target in spans])[None]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, cached: CachedLayer | None = None) -> Tensor:
        """Computes full attention inside each span.

        Args:
            query: (batch, tokens, heads, head_dim): joint tokens, or the targets only.
            key, value: (batch, joint tokens, heads, head_dim).
            cached: appended to each span's keys and values; the result does not depend on their position.

        Returns:
            (batch, query's tokens, heads · head_dim).
        """
        if self.is_batch and cached is None:
            return attention(query, key, value)
        return self._attend_by_span(query, key, value, cached)

    def _interleave(self, text: Tensor, image: Tensor) -> Tensor:
        texts = torch.split(text, list(self.text_lengths), dim=1)
        images = torch.split(image, list(self.image_lengths), dim=1)
        return torch.cat([part for pair in zip(texts, images, strict=True) for part in pair], dim=1)

    def _separate(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        lengths = [n for pair in zip(self.text_lengths, self.image_lengths, strict=True) for n in pair]
        parts = torch.split(joint, lengths, dim=1)
        return torch.cat(parts[::2], dim=1), torch.cat(parts[1::2], dim=1)

    def _attend_by_span(
        self, query: Tensor, key: Tensor, value: Tensor, cached: CachedLayer | None
    ) -> Tensor:
        parts = [None] * len(self.joint_lengths) if cached is None else list(cached.parts)
        if self.is_batch:
            return attention(query, *_with_cached(key, value, parts))
        is_joint = query.shape[1] == key.shape[1]
        query_lengths = self.joint_lengths if is_joint else self.target_lengths
        # Neighboring spans with equal lengths share one attention call.
        all_lengths = zip(query_lengths, self.joint_lengths, self.cached_lengths, strict=True)
        run_sizes = [len(list(run)) for _, run in groupby(all_lengths)]
        runs = zip(
            _split_runs(query, query_lengths, run_sizes),
            _split_runs(key, self.joint_lengths, run_sizes),
            _split_runs(value, self.joint_lengths, run_sizes),
            _grouped(parts, run_sizes),
            strict=True,
        )
        attended = [attention(q, *_with_cached(k, v, run)).flatten(0, 1) for q, k, v, run in runs]
        return torch.cat(attended)[None]


def exclude_from_compile() -> None:
    """Excludes methods that depend on token counts or adapters from torch.compile; compiled blocks call them.

    Token counts are Python numbers there, so each new combination would compile another program. Not a decorator,
    because that imports the compiler, which takes seconds that only compiled blocks need.
    """
    by_lengths = ((Packing, "_interleave"), (Packing, "_separate"), (Packing, "_attend_by_span"))
    for owner, name in (*by_lengths, (Linear, "_adapt")):
        method = getattr(owner, name)
        if not getattr(method, "_torchdynamo_disable", False):
            setattr(owner, name, torch.compiler.disable(method))  # type: ignore[no-untyped-call]


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Computes softmax attention, scaled by 1/√head_dim.

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


def _split_runs(tokens: Tensor, lengths: Sequence[int], run_sizes: Sequence[int]) -> list[Tensor]:
    """Splits (1, tokens, …) into one batch for each run of equal spans: (spans, tokens, …) each."""
    run_lengths = [run[0] for run in _grouped(lengths, run_sizes)]
    sizes = [length * count for length, count in zip(run_lengths, run_sizes, strict=True)]
    return [
        torch.unflatten(run, 0, (count, length))
        for run, length, count in zip(torch.split(tokens[0], sizes), run_lengths, run_sizes, strict=True)
    ]


def _grouped(items: Sequence[_Item], sizes: Sequence[int]) -> list[list[_Item]]:
    """Splits a sequence into lists of the given sizes."""
    remaining = iter(items)
    return [list(islice(remaining, size)) for size in sizes]


def _with_cached(key: Tensor, value: Tensor, parts: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Appends cached keys and values to each span's, (spans, tokens, heads, head_dim)."""
    cached = [part for part in parts if part is not None]
    if not cached:
        return key, value
    return _appended(key, [part[0] for part in cached]), _appended(value, [part[1] for part in cached])


def _appended(tokens: Tensor, cached: Sequence[Tensor]) -> Tensor:
    """Appends (cached tokens, …) to each span's (tokens, …), copying every value once."""
    spans, length = tokens.shape[:2]
    whole = tokens.new_empty(spans, length + cached[0].shape[0], *tokens.shape[2:])
    whole[:, :length] = tokens
    for span, part in enumerate(cached):
        whole[span, length:] = part
    return whole
