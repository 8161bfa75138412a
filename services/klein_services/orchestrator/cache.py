"""Prompt embeddings and reference latents that were made before, by the bytes they were made from."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from klein_services.runtime.metrics import CACHE_BYTES, CACHE_EVICTIONS

PROMPT_EMBEDDING: Final = "prompt_embedding"
REFERENCE_LATENTS: Final = "reference_latents"


@dataclass(frozen=True)
class CacheKey:
    """What decides a tensor's bytes."""

    kind: str
    model: str
    """The model that made it, with the version and element type that its stage reported."""
    digest: bytes
    """SHA-256 of the content. Callers share the cache, so nobody may be able to make two contents collide."""

    @classmethod
    def of(cls, kind: str, model: str, content: bytes) -> CacheKey:
        return cls(kind, model, hashlib.sha256(content).digest())


@dataclass(frozen=True)
class CachedTensor:
    """A stage's answer, message by message."""

    summary: bytes
    """The serialized summary message."""
    frames: tuple[bytes, ...]
    """The frames as `wire` moves them."""

    @property
    def size_bytes(self) -> int:
        return len(self.summary) + sum(map(len, self.frames))


@dataclass
class CacheWriter:
    """Keeps a copy of an answer while it is relayed, and gives up when it grows over its limit."""

    limit_bytes: int
    summary: bytes = b""
    _frames: list[bytes] = field(default_factory=list)
    _size_bytes: int = 0

    def add(self, frame: bytes) -> None:
        self._size_bytes += len(frame)
        if self._size_bytes <= self.limit_bytes:
            self._frames.append(frame)
        else:
            self._frames.clear()

    def finish(self) -> CachedTensor | None:
        """Returns the whole answer, or `None` if it grew too large to keep."""
        if self._size_bytes > self.limit_bytes:
            return None
        return CachedTensor(self.summary, tuple(self._frames))


class TensorCache:
    """The most recently used tensors, at most `capacity_bytes` of them; 0 keeps none."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._entries: OrderedDict[CacheKey, CachedTensor] = OrderedDict()
        self.size_bytes = 0

    def get(self, key: CacheKey) -> CachedTensor | None:
        """Returns the tensor of `key` and marks it as used."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: CacheKey, entry: CachedTensor | None) -> None:
        """Keeps `entry`; the least recently used ones make room. One that cannot fit is not kept."""
        if entry is None or entry.size_bytes > self._capacity_bytes:
            return
        self.discard(key)
        self._entries[key] = entry
        self._count(key, entry.size_bytes)
        while self.size_bytes > self._capacity_bytes:
            oldest = next(iter(self._entries))
            CACHE_EVICTIONS.labels(oldest.kind).inc()
            self.discard(oldest)

    def discard(self, key: CacheKey) -> None:
        """Forgets the tensor of `key`, if there is one."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._count(key, -entry.size_bytes)

    def record(self) -> CacheWriter:
        """Starts to keep a copy of an answer."""
        return CacheWriter(self._capacity_bytes)

    def _count(self, key: CacheKey, byte_count: int) -> None:
        self.size_bytes += byte_count
        CACHE_BYTES.labels(key.kind).inc(byte_count)
