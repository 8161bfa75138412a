"""TensorCache: the tensors that the orchestrator keeps to use them again, and those that are on their way."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from klein_services.orchestrator.single_flight import SingleFlight
from klein_services.runtime.byte_lru import ByteLru
from klein_services.runtime.metrics import initialize_caches

PROMPT_EMBEDDING: Final = "prompt_embedding"
REFERENCE_LATENTS: Final = "reference_latents"
INITIAL_IMAGE: Final = "initial_image"


@dataclass(frozen=True)
class CacheKey:
    """Everything that determines a tensor's bytes."""

    kind: str
    model: str
    """The model that made it, with the version and element type that its stage reported."""
    digest: bytes
    """SHA-256 of the content. Clients share the cache, so no client may be able to make two contents collide."""

    @classmethod
    def of(cls, kind: str, model: str, *content: bytes) -> CacheKey:
        digest = hashlib.sha256()
        for part in content:
            # With its length, so that no two lists of parts make the same bytes.
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return cls(kind, model, digest.digest())


@dataclass(frozen=True)
class CachedTensor:
    """A stage's response, message by message."""

    summary: bytes
    """The serialized summary message."""
    frames: tuple[bytes, ...]
    """The serialized frames, as `protowire` moves them."""

    @property
    def size_bytes(self) -> int:
        return len(self.summary) + sum(map(len, self.frames))


class TensorCache(ByteLru[CacheKey, CachedTensor]):
    """The most recently used tensors, at most `limit_bytes` of them; 0 keeps none."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(limit_bytes, lambda key: key.kind)
        self.flights = SingleFlight(limit_bytes)
        """Encodings in progress, which requests for the same tensor share."""
        initialize_caches((PROMPT_EMBEDDING, REFERENCE_LATENTS, INITIAL_IMAGE))

    def writer(self, key: CacheKey) -> CacheWriter:
        """Returns a writer that adds a response to the cache while it is relayed."""
        return CacheWriter(self, key)


@dataclass
class CacheWriter:
    """Copy of a response that is being relayed; holds nothing once the response is larger than the cache."""

    cache: TensorCache
    key: CacheKey
    _frames: list[bytes] = field(default_factory=list)
    _size_bytes: int = 0

    def add(self, frame: bytes) -> None:
        self._size_bytes += len(frame)
        if self._size_bytes <= self.cache.limit_bytes:
            self._frames.append(frame)
        else:
            self._frames.clear()

    def commit(self, summary: bytes) -> None:
        """Adds the whole response to the cache, if it is not too large."""
        if self._size_bytes <= self.cache.limit_bytes:
            self.cache.put(self.key, CachedTensor(summary, tuple(self._frames)))
