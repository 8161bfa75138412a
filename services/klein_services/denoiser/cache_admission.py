"""CacheAdmission: which requests may use the reference KV cache next, so that none starves. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from klein_services.denoiser.reference_kv_cache import ReferenceCaches
from klein_services.denoiser.scheduled_request import CacheSpec, ScheduledRequest, WorkItem


class CacheAdmission:
    """Starvation-free admission to the reference KV cache.

    One waiting request at a time holds a reservation: the first in the order of service that needs a cache. Others
    may start to use a cache, existing or new, only if the reserved one still fits next to it. Requests that already use
    a cache go on to their end, which frees the room. A starving request gets the reservation ahead of more urgent ones
    and keeps it until it has its cache or leaves.
    """

    def __init__(self, caches: ReferenceCaches[Any]) -> None:
        self._caches = caches
        self._reservation: ScheduledRequest | None = None
        self._starving_reservation: ScheduledRequest | None = None

    def reserve(self, ready: Sequence[ScheduledRequest], starving: Sequence[ScheduledRequest]) -> None:
        """Chooses the request that holds the reservation for the next batch.

        Args:
            ready: requests that may be in the batch, in the order of service.
            starving: those of them that are starving and due, the oldest first.
        """
        waiting = [request for request in ready if request.needs_cache]
        if self._starving_reservation not in waiting:
            self._starving_reservation = next((request for request in starving if request.needs_cache), None)
        self._reservation = self._starving_reservation or next(iter(waiting), None)

    def items(self, request: ScheduledRequest, taken: Sequence[WorkItem] = ()) -> list[WorkItem]:
        """Returns what a request can do in a batch that already holds `taken`.

        Empty while the request's cache is being computed or has no room.
        """
        steps = [WorkItem(request, request.next_image + i) for i in range(request.images_left_in_step)]
        cache = request.cache
        if cache is None or request.has_cache:
            return steps
        others = [item.request.cache for item in taken if item.image is None]
        computed = {other.key: other.size_bytes for other in others if other is not None}
        if cache.key in computed or not self._has_room(cache, computed):
            return []
        return steps if cache.key in self._caches else [WorkItem(request, None)]

    def acquire(self, item: WorkItem) -> None:
        """Pins an existing cache for a request that is about to use it for the first time."""
        request = item.request
        if item.image is not None and request.cache is not None and not request.has_cache:
            self._caches.acquire(request.cache.key)
            request.has_cache = True

    def _has_room(self, cache: CacheSpec, computed: Mapping[str, int]) -> bool:
        """Returns whether `cache` may come into use next to `computed`, those in use and the reserved one."""
        holder = self._reservation
        reserved = None if holder is None or holder.has_cache else holder.cache
        is_covered = (
            reserved is None
            or reserved.key == cache.key
            or reserved.key in computed
            or self._caches.is_used(reserved.key)
        )
        reserved_bytes = 0 if reserved is None or is_covered else reserved.size_bytes
        is_used = self._caches.is_used(cache.key)
        if is_used and not reserved_bytes:
            return True
        return self._caches.has_room(
            0 if is_used else cache.size_bytes, sum(computed.values()) + reserved_bytes
        )
