"""Reference cache: keys and values of reference tokens, computed once.

Models of the reference-cache kind (9b-kv) were trained so that reference tokens attend only to each other and are
always modulated as at timestep 0. Their keys and values therefore depend on the references alone: they are valid for
every step, prompt, seed and size, and for every request with the same references in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klein_core.variants import TransformerConfig

REFERENCE_SIGMA = 0.0
"""Noise level of reference tokens' modulation, at every noise level of the target."""


@dataclass(frozen=True, eq=False)
class ReferenceCache:
    """Keys and values of all reference tokens in every layer. Immutable once computed: requests share it."""

    keys_values: Tensor
    """(layers, key or value, reference tokens, heads, head_dim): double-stream layers first, keys after RoPE."""

    @classmethod
    def empty(
        cls, config: TransformerConfig, token_count: int, dtype: torch.dtype, device: torch.device
    ) -> ReferenceCache:
        """Allocates an uninitialized cache for `token_count` reference tokens."""
        shape = cache_shape(config, token_count)
        return cls(torch.empty(shape, dtype=dtype, device=device))

    @property
    def token_count(self) -> int:
        """Reference tokens."""
        return self.keys_values.shape[2]

    @property
    def size_bytes(self) -> int:
        """Bytes on its device."""
        return self.keys_values.numel() * self.keys_values.itemsize


@dataclass(frozen=True, eq=False)
class CachedLayer:
    """One layer's keys and values from the reference caches of a step's spans."""

    parts: tuple[Tensor | None, ...]
    """(key or value, reference tokens, heads, head_dim) for each span; `None` where it has no cache."""


def cache_shape(config: TransformerConfig, token_count: int) -> tuple[int, ...]:
    """Returns the shape of `ReferenceCache.keys_values`."""
    layers = config.num_layers + config.num_single_layers
    return (layers, 2, token_count, config.num_attention_heads, config.attention_head_dim)


def bytes_per_token(config: TransformerConfig, dtype: torch.dtype) -> int:
    """Returns a cache's bytes for each reference token: 512 KiB for klein-9B in bfloat16."""
    layers = config.num_layers + config.num_single_layers
    return layers * 2 * config.hidden_size * dtype.itemsize


def cached_layers(
    caches: Sequence[ReferenceCache | None], config: TransformerConfig
) -> list[CachedLayer | None]:
    """Splits the spans' caches by layer; every entry is `None` if no span has a cache."""
    count = config.num_layers + config.num_single_layers
    if not any(caches):
        return [None] * count
    return [
        CachedLayer(tuple(None if cache is None else cache.keys_values[layer] for cache in caches))
        for layer in range(count)
    ]
