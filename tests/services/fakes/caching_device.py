"""Simulated device that keeps reference caches, driven by a real scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from klein_services.denoiser.reference_kv_cache import ReferenceCaches
from klein_services.denoiser.scheduled_request import Batch, CacheSpec, ScheduledRequest
from klein_services.denoiser.scheduler import Scheduler, SchedulerConfig
from tests.services.fakes.simulated_device import activate

LIMIT = 100
"""Bytes of caches, unless a test sets another limit."""


@dataclass(frozen=True)
class Block:
    """A cache of so many bytes."""

    size_bytes: int


class Device:
    """Runs a scheduler's batches as the engine does, with blocks for caches."""

    def __init__(self, config: SchedulerConfig, cache_bytes: int) -> None:
        self.caches: ReferenceCaches[Block] = ReferenceCaches(cache_bytes)
        self.scheduler = Scheduler(config, caches=self.caches)
        self.batches: list[Batch] = []
        self.now = 0.0
        self.peak_bytes = 0

    def request(self, **fields) -> ScheduledRequest:
        return ScheduledRequest(**{"image_tokens": 10, "step_count": 2, **fields})

    def admit(self, **fields) -> ScheduledRequest:
        """Admits a request whose tensors have not come."""
        request = self.request(**fields)
        self.scheduler.admit(request, self.now)
        return request

    def activate(self, request: ScheduledRequest) -> None:
        activate(self.scheduler, request, self.now)

    def submit(self, **fields) -> ScheduledRequest:
        request = self.admit(**fields)
        self.activate(request)
        return request

    def step(self) -> bool:
        for request in self.scheduler.reap(self.now):
            self._leave(request)
        batch = self.scheduler.schedule(self.now)
        if batch is None:
            assert not self.scheduler.requests, "a request waits for ever"
            return False
        self.batches.append(batch)
        for item in batch.items:
            self._do(item.request, item.image)
        self.now += batch.tokens * 0.001
        for request in self.scheduler.on_step_done(batch, batch.tokens * 0.001):
            self._leave(request)
        return True

    def run(self) -> None:
        while self.step():
            pass

    def _do(self, request: ScheduledRequest, image: int | None) -> None:
        cache = request.cache
        if image is None:
            assert not request.has_cache
            self.caches.make_room(cache.size_bytes)
            self.caches.add(cache.key, Block(cache.size_bytes))
            request.has_cache = True
            self.peak_bytes = max(self.peak_bytes, self.caches.size_bytes)
        elif cache is not None:
            assert request.has_cache
            assert self.caches.get(cache.key).size_bytes == cache.size_bytes

    def _leave(self, request: ScheduledRequest) -> None:
        if request.has_cache:
            self.caches.release(request.cache.key)
            request.has_cache = False


def cache(key: str, size_bytes: int = 40, tokens: int = 20) -> CacheSpec:
    return CacheSpec(key=key, tokens=tokens, size_bytes=size_bytes)
