"""A simulated device that keeps reference caches, and a scheduler that decides for it."""

from __future__ import annotations

from dataclasses import dataclass

from klein_services.denoiser.job import CacheSpec, Job, JobSpec, Plan
from klein_services.denoiser.reference_kv_cache import ReferenceCaches
from klein_services.denoiser.scheduler import Scheduler, SchedulerConfig

LIMIT = 100
"""Bytes of caches, where a test says nothing else."""


@dataclass(frozen=True)
class Block:
    """So many bytes."""

    size_bytes: int


class Device:
    """Runs a scheduler's plans as the engine does, with blocks for caches."""

    def __init__(self, limits: SchedulerConfig, cache_bytes: int) -> None:
        self.caches: ReferenceCaches[Block] = ReferenceCaches(cache_bytes)
        self.scheduler = Scheduler(limits, caches=self.caches)
        self.plans: list[Plan] = []
        self.now = 0.0
        self.peak_bytes = 0

    def spec(self, **fields) -> JobSpec:
        return JobSpec(**{"image_tokens": 10, "step_count": 2, **fields})

    def submit(self, **fields) -> Job:
        spec = self.spec(**fields)
        job = self.scheduler.admit(spec, self.now)
        self.scheduler.make_ready(job, spec, self.now)
        return job

    def step(self) -> bool:
        for job in self.scheduler.sweep(self.now):
            self._leave(job)
        plan = self.scheduler.choose(self.now)
        if plan is None:
            assert not self.scheduler.jobs, "somebody waits for ever"
            return False
        self.plans.append(plan)
        for unit in plan.units:
            self._do(unit.job, unit.image)
        self.now += plan.tokens * 0.001
        for job in self.scheduler.complete(plan, plan.tokens * 0.001):
            self._leave(job)
        return True

    def run(self) -> None:
        while self.step():
            pass

    def _do(self, job: Job, image: int | None) -> None:
        cache = job.spec.cache
        if image is None:
            assert not job.has_cache
            self.caches.make_room(cache.size_bytes)
            self.caches.add(cache.key, Block(cache.size_bytes))
            job.has_cache = True
            self.peak_bytes = max(self.peak_bytes, self.caches.size_bytes)
        elif cache is not None:
            assert job.has_cache
            assert self.caches.get(cache.key).size_bytes == cache.size_bytes

    def _leave(self, job: Job) -> None:
        if job.has_cache:
            self.caches.release(job.spec.cache.key)
            job.has_cache = False


def cache(key: str, size_bytes: int = 40, tokens: int = 20) -> CacheSpec:
    return CacheSpec(key=key, tokens=tokens, size_bytes=size_bytes)
