"""Least-recently-used cache that is bounded in bytes, with pins and metrics."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from klein_services.runtime.metrics import CACHE_BYTES, CACHE_EVICTIONS


class Sized(Protocol):
    """A value with a size in bytes."""

    @property
    def size_bytes(self) -> int: ...


Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value", bound=Sized)


@dataclass(eq=False)
class _Entry(Generic[Value]):
    value: Value
    pin_count: int


class ByteLru(Generic[Key, Value]):
    """Keeps the most recently used values within `limit_bytes`; pinned values stay, even over the limit.

    Not thread-safe. Reports `klein_cache_bytes` and `klein_cache_evictions_total`.

    Args:
        limit_bytes: 0 keeps nothing that is not pinned.
        kind: returns the metrics' label of a key.
    """

    def __init__(self, limit_bytes: int, kind: Callable[[Key], str]) -> None:
        self.limit_bytes = limit_bytes
        self.size_bytes = 0
        self._kind = kind
        self._entries: OrderedDict[Key, _Entry[Value]] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the pinned values."""
        return sum(entry.value.size_bytes for entry in self._entries.values() if entry.pin_count)

    def is_pinned(self, key: Key) -> bool:
        entry = self._entries.get(key)
        return entry is not None and entry.pin_count > 0

    def get(self, key: Key) -> Value | None:
        """Returns the value of `key`, if there is one, and marks it as used."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry.value

    def put(self, key: Key, value: Value, *, pinned: bool = False) -> None:
        """Adds or replaces a value and evicts others to make room. Drops an unpinned value over the limit at once.

        Args:
            key: if its present value is pinned, it must not be replaced.
            value: what is kept.
            pinned: adds the first pin, which `unpin` removes.
        """
        if self.is_pinned(key):
            raise ValueError("a pinned value cannot be replaced")
        if value.size_bytes > self.limit_bytes and not pinned:
            return
        self.discard(key)
        self._entries[key] = _Entry(value, pin_count=int(pinned))
        self._count(key, value.size_bytes)
        self.make_room()

    def pin(self, key: Key) -> Value:
        """Returns a value that is there and keeps it until as many calls of `unpin`."""
        entry = self._entries[key]
        entry.pin_count += 1
        self._entries.move_to_end(key)
        return entry.value

    def unpin(self, key: Key) -> None:
        """Removes one pin. After the last, the value is kept only if it is within the limit."""
        entry = self._entries[key]
        entry.pin_count -= 1
        if not entry.pin_count and entry.value.size_bytes > self.limit_bytes:
            self.discard(key)
        self.make_room()

    def make_room(self, size_bytes: int = 0) -> None:
        """Evicts unpinned values, least recently used first, until `size_bytes` more fit or none are left."""
        while self.size_bytes + size_bytes > self.limit_bytes:
            key = next((key for key, entry in self._entries.items() if not entry.pin_count), None)
            if key is None:
                return
            CACHE_EVICTIONS.labels(self._kind(key)).inc()
            self.discard(key)

    def discard(self, key: Key) -> None:
        """Removes the value of `key`, if there is one, pinned or not."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._count(key, -entry.value.size_bytes)

    def _count(self, key: Key, byte_count: int) -> None:
        self.size_bytes += byte_count
        CACHE_BYTES.labels(self._kind(key)).inc(byte_count)
