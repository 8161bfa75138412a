"""The reference caches on the device, by what they were computed from.

Torch-free. Not thread-safe: only the engine's thread changes it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from klein_services.runtime.metrics import CACHE_BYTES, CACHE_EVICTIONS, CACHE_REQUESTS

REFERENCE_CACHE: Final = "reference_cache"
HIT, MISS = "hit", "miss"


class Sized(Protocol):
    """What is kept."""

    @property
    def size_bytes(self) -> int: ...


_Cache = TypeVar("_Cache", bound=Sized)


@dataclass(eq=False)
class _Entry(Generic[_Cache]):
    cache: _Cache
    users: int = 0


class ReferenceCaches(Generic[_Cache]):
    """Keeps the most recently used caches, those in use always, within `limit_bytes`.

    A cache larger than that is made when no other is in use and dropped after its last use. Requests that share
    references share a cache, so a hit gives the same bits.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._entries: OrderedDict[str, _Entry[_Cache]] = OrderedDict()
        self.size_bytes = 0

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def is_used(self, key: str) -> bool:
        """Whether a request uses it now."""
        entry = self._entries.get(key)
        return entry is not None and entry.users > 0

    def get(self, key: str) -> _Cache:
        """Returns a cache that is there."""
        return self._entries[key].cache

    def acquire(self, key: str) -> None:
        """Takes a cache that is there into use: a hit."""
        CACHE_REQUESTS.labels(REFERENCE_CACHE, HIT).inc()
        self._entries[key].users += 1
        self._entries.move_to_end(key)

    def has_room(self, size_bytes: int, other_bytes: int = 0) -> bool:
        """Whether a cache may come into use beside those that are; always if none are.

        `other_bytes` are those of caches that are being made or that were promised room.
        """
        used = other_bytes + sum(entry.cache.size_bytes for entry in self._entries.values() if entry.users)
        return used == 0 or used + size_bytes <= self._limit_bytes

    def make_room(self, size_bytes: int) -> None:
        """Drops what is not in use, the least recently used first, until so much more fits or nothing is left."""
        for key in [key for key, entry in self._entries.items() if not entry.users]:
            if self.size_bytes + size_bytes <= self._limit_bytes:
                return
            CACHE_EVICTIONS.labels(REFERENCE_CACHE).inc()
            self._drop(key)

    def add(self, key: str, cache: _Cache) -> None:
        """Takes a new cache into use: what a miss ends with."""
        CACHE_REQUESTS.labels(REFERENCE_CACHE, MISS).inc()
        self._entries[key] = _Entry(cache, users=1)
        self._count(cache.size_bytes)

    def release(self, key: str) -> None:
        """Ends one use. What would not fit alone is not kept."""
        entry = self._entries[key]
        entry.users -= 1
        if not entry.users and entry.cache.size_bytes > self._limit_bytes:
            self._drop(key)
        self.make_room(0)

    def drop_unused(self) -> bool:
        """Gives up all that is not in use, for want of memory; returns whether there was any."""
        size_bytes = self.size_bytes
        self.make_room(self._limit_bytes + 1)
        return self.size_bytes < size_bytes

    def _drop(self, key: str) -> None:
        self._count(-self._entries.pop(key).cache.size_bytes)

    def _count(self, byte_count: int) -> None:
        self.size_bytes += byte_count
        CACHE_BYTES.labels(REFERENCE_CACHE).inc(byte_count)
