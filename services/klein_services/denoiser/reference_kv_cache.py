"""LRU of reference caches (keys and values of reference tokens) on the device, keyed by what they are computed from.

Torch-free. Not thread-safe: only the engine's thread changes it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from klein_services.runtime.metrics import CACHE_BYTES, CACHE_EVICTIONS, CACHE_REQUESTS, initialize_caches

REFERENCE_CACHE: Final = "reference_cache"
HIT, MISS = "hit", "miss"


class Sized(Protocol):
    """An object with a size in bytes."""

    @property
    def size_bytes(self) -> int: ...


_Cache = TypeVar("_Cache", bound=Sized)


@dataclass(eq=False)
class _Entry(Generic[_Cache]):
    cache: _Cache
    users: int = 0


class ReferenceCaches(Generic[_Cache]):
    """Keeps caches in use, and the most recently used others, within `limit_bytes`.

    A cache larger than the limit is allowed while no other is in use, and dropped after its last use. Requests with the
    same references and adapters share one cache, so a hit gives bit-identical results.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._entries: OrderedDict[str, _Entry[_Cache]] = OrderedDict()
        self.size_bytes = 0
        initialize_caches((REFERENCE_CACHE,))

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def is_used(self, key: str) -> bool:
        """Returns whether a request uses the cache now."""
        entry = self._entries.get(key)
        return entry is not None and entry.users > 0

    def get(self, key: str) -> _Cache:
        """Returns a cache. Raises KeyError when it is absent."""
        return self._entries[key].cache

    def acquire(self, key: str) -> None:
        """Adds a user to a cache, which pins it, and counts a hit. Raises KeyError when it is absent."""
        CACHE_REQUESTS.labels(REFERENCE_CACHE, HIT).inc()
        self._entries[key].users += 1
        self._entries.move_to_end(key)

    def has_room(self, size_bytes: int, other_bytes: int = 0) -> bool:
        """Returns whether a cache of `size_bytes` fits next to those in use; always true when none is.

        Args:
            size_bytes: size of the cache.
            other_bytes: bytes of caches that are being computed or have a reservation.
        """
        used = other_bytes + sum(entry.cache.size_bytes for entry in self._entries.values() if entry.users)
        return used == 0 or used + size_bytes <= self._limit_bytes

    def make_room(self, size_bytes: int) -> None:
        """Drops unused caches, least recently used first, until `size_bytes` more fit or no unused one is left."""
        for key in [key for key, entry in self._entries.items() if not entry.users]:
            if self.size_bytes + size_bytes <= self._limit_bytes:
                return
            CACHE_EVICTIONS.labels(REFERENCE_CACHE).inc()
            self._drop(key)

    def add(self, key: str, cache: _Cache) -> None:
        """Stores a new cache with one user, and counts a miss."""
        CACHE_REQUESTS.labels(REFERENCE_CACHE, MISS).inc()
        self._entries[key] = _Entry(cache, users=1)
        self._add_bytes(cache.size_bytes)

    def release(self, key: str) -> None:
        """Removes a user from a cache. An unused cache above the limit is dropped."""
        entry = self._entries[key]
        entry.users -= 1
        if not entry.users and entry.cache.size_bytes > self._limit_bytes:
            self._drop(key)
        self.make_room(0)

    def drop_unused(self) -> bool:
        """Drops all unused caches, to free device memory; returns whether there were any."""
        size_bytes = self.size_bytes
        self.make_room(self._limit_bytes + 1)
        return self.size_bytes < size_bytes

    def _drop(self, key: str) -> None:
        self._add_bytes(-self._entries.pop(key).cache.size_bytes)

    def _add_bytes(self, byte_count: int) -> None:
        self.size_bytes += byte_count
        CACHE_BYTES.labels(REFERENCE_CACHE).inc(byte_count)
