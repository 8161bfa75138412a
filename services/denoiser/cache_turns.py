"""Who may take a reference cache into use next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from services.denoiser.job import CacheSpec, Job, Unit
from services.denoiser.reference_caches import ReferenceCaches


class CacheTurns:
    """Gives the caches' room to requests in the order of service, so that nobody waits for it for ever.

    The next request that needs a cache has a claim: others may begin to use one, be it kept or new, only where the
    claimed one fits beside it. Those that use theirs already go on to their end, which is what makes room. A request
    that has waited long claims before more urgent ones, and keeps its claim until it is met or the request leaves.
    """

    def __init__(self, caches: ReferenceCaches[Any]) -> None:
        self._caches = caches
        self._claimant: Job | None = None
        self._aged_claimant: Job | None = None

    def claim(self, ready: Sequence[Job], aged: Sequence[Job]) -> None:
        """Finds the claimant of the next plan.

        Args:
            ready: the requests that could be in it, in the order of service.
            aged: those of them whose turn it is because they have waited long, the oldest first.
        """
        waiting = [job for job in ready if job.needs_cache]
        if self._aged_claimant not in waiting:
            self._aged_claimant = next((job for job in aged if job.needs_cache), None)
        self._claimant = self._aged_claimant or next(iter(waiting), None)

    def units(self, job: Job, taken: Sequence[Unit] = ()) -> list[Unit]:
        """Returns what a job could do beside `taken`: nothing while its cache is being made or has no room."""
        steps = [Unit(job, job.next_image + i) for i in range(job.units_left_in_step)]
        cache = job.spec.cache
        if cache is None or job.has_cache:
            return steps
        others = [unit.job.spec.cache for unit in taken if unit.image is None]
        made = {other.key: other.size_bytes for other in others if other is not None}
        if cache.key in made or not self._has_room(cache, made):
            return []
        return steps if cache.key in self._caches else [Unit(job, None)]

    def take(self, unit: Unit) -> None:
        """Keeps a cache that is there already from being dropped before its job has stepped."""
        job = unit.job
        if unit.image is not None and job.spec.cache is not None and not job.has_cache:
            self._caches.acquire(job.spec.cache.key)
            job.has_cache = True

    def _has_room(self, cache: CacheSpec, made: Mapping[str, int]) -> bool:
        claimed_bytes = self._claimed_bytes(cache, made)
        is_used = self._caches.is_used(cache.key)
        if is_used and not claimed_bytes:
            return True
        return self._caches.has_room(0 if is_used else cache.size_bytes, sum(made.values()) + claimed_bytes)

    def _claimed_bytes(self, cache: CacheSpec, made: Mapping[str, int]) -> int:
        """Returns what has to be left for the claimant beside `cache` and those that are in use or made."""
        claimed = None if self._claimant is None or self._claimant.has_cache else self._claimant.spec.cache
        if claimed is None or claimed.key == cache.key:
            return 0
        is_there = claimed.key in made or self._caches.is_used(claimed.key)
        return 0 if is_there else claimed.size_bytes
