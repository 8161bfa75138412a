"""Who may take a reference cache into use next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from klein_services.denoiser.estimates import Estimates, StepBudget, StepTimes
from klein_services.denoiser.job import CacheSpec, Job, JobSpec, Plan, Unit
from klein_services.denoiser.reference_kv_cache import ReferenceCaches
from klein_services.runtime.errors import DeadlineUnreachable, QueueFull


class CacheAdmission:
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


UNKNOWN_RETRY_SECONDS = 1.0
"""Hint to callers that find the queue full before any step was measured."""
RETRY_SECONDS = (0.1, 60.0)
"""Bounds of that hint."""


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Bounds that the scheduler keeps."""

    queue_limit: int = 64
    """Requests that may wait to be started."""
    token_budget: int = 0
    """Tokens of one step; 0 means one image at a time. A larger single image runs alone."""
    step_image_limit: int = 64
    """Images in one step."""
    memory_limit_bytes: int = 4 * 1024**3
    """Bytes of all admitted requests' tensors; a single request may exceed it."""
    ageing_seconds: float = 30.0
    """After so long a request counts as aged."""
    aged_share: float = 0.125
    """The share of the device's time that the oldest aged request gets, however urgent the others are."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """How busy the device is."""

    queued_count: int
    running_count: int
    estimated_wait_seconds: float | None
    """Until a newcomer starts; `None` when unknown."""
    capacity: int
    """Such newcomers that one step takes."""


class Scheduler:
    """Earliest deadline first within priority classes, first come first served among equals.

    The order is strict, so a running request pauses at a step boundary for one that goes before it; its state
    stays where it is. Strictness starves, hence the oldest aged request leads a step whenever it has had less
    than `aged_share` of the time since it was first passed over.

    A request whose references are cached has its cache computed in a turn of its own, or beside the steps of others
    as far as the token budget goes. It waits while caches in use leave no room for another, and lets pass those that
    need none or have theirs: see `CacheAdmission`.
    """

    def __init__(
        self,
        limits: SchedulerConfig,
        step_times: StepTimes | None = None,
        caches: ReferenceCaches[Any] | None = None,
    ) -> None:
        self.limits = limits
        self.caches = caches or ReferenceCaches[Any](0)
        self._cache_turns = CacheAdmission(self.caches)
        self.budget = StepBudget(limits.token_budget, limits.step_image_limit)
        self.step_times = step_times or StepTimes()
        self.estimates = Estimates(self.step_times, self.budget, self.caches)
        self._jobs: dict[int, Job] = {}
        self._sequence = 0
        self._aged_credit_seconds = 0.0

    @property
    def jobs(self) -> tuple[Job, ...]:
        """Everything admitted and not yet left, in the order of service."""
        return tuple(sorted(self._jobs.values(), key=lambda job: job.order))

    @property
    def queued_count(self) -> int:
        return sum(not job.is_started for job in self._jobs.values())

    @property
    def running_count(self) -> int:
        return sum(job.is_started for job in self._jobs.values())

    def admit(self, spec: JobSpec, now: float) -> Job:
        """Reserves a place; the job is chosen only after `make_ready`.

        Raises:
            QueueFull: as many wait as may, or their tensors take all the memory they may.
            DeadlineUnreachable: measured step times say that it would end too late.
        """
        if self.queued_count >= self.limits.queue_limit:
            raise QueueFull(self.limits.queue_limit, self._retry_seconds())
        job = Job(spec, self._sequence, admitted_at=now)
        self._refuse_too_large(job, spec)
        self._refuse_hopeless(job, now)
        self._sequence += 1
        self._jobs[job.sequence] = job
        return job

    def make_ready(self, job: Job, spec: JobSpec, now: float) -> None:
        """Says that the job's tensors are here, and with them what it really asks for.

        Raises:
            QueueFull: with its references it takes more memory than the others leave.
            DeadlineUnreachable: measured step times say that it would end too late.
        """
        self._refuse_too_large(job, spec)
        job.spec = spec
        self._refuse_hopeless(job, now)
        job.is_ready = True

    def cancel(self, job: Job) -> None:
        """Says that nobody wants the job any more; it leaves at the next `sweep`."""
        job.is_cancelled = True

    def sweep(self, now: float) -> list[Job]:
        """Removes and returns cancelled and expired jobs."""
        gone = [job for job in self._jobs.values() if job.is_unwanted(now)]
        self.remove(gone)
        return gone

    def remove(self, jobs: Iterable[Job]) -> None:
        """Forgets jobs that ended in another way than by their last step."""
        for job in jobs:
            self._jobs.pop(job.sequence, None)

    def choose(self, now: float) -> Plan | None:
        """Returns the next step, or `None` when nothing is ready."""
        ready = [job for job in self.jobs if job.is_ready]
        if not ready:
            return None
        aged = self._aged(ready, now)
        lead = self._aged_lead(ready, aged)
        units = self._fill(ready if lead is None else [lead, *(job for job in ready if job is not lead)])
        starting = tuple(dict.fromkeys(unit.job for unit in units if not unit.job.is_started))
        for job in starting:
            job.started_at = now
        passes_over = bool(aged) and all(unit.job is not aged[0] for unit in units)
        return Plan(units, starting, lead is not None, passes_over)

    def _aged(self, ready: Iterable[Job], now: float) -> list[Job]:
        aged = [job for job in ready if now - job.admitted_at >= self.limits.ageing_seconds]
        return sorted(aged, key=lambda job: job.sequence)

    def _aged_lead(self, ready: Sequence[Job], aged: Sequence[Job]) -> Job | None:
        """Returns the oldest aged job that can do something, where it is its turn and it is not the first anyway."""
        due = aged if self._aged_credit_seconds >= 0 else ()
        self._cache_turns.claim(ready, due)
        lead = next((job for job in due if self._cache_turns.units(job)), None)
        return None if lead is ready[0] else lead

    def complete(self, plan: Plan, seconds: float) -> list[Job]:
        """Books a step that took `seconds`; returns the jobs that this finished, which leave."""
        self.step_times.observe([unit.tokens for unit in plan.units], seconds)
        self._book_credit(plan, seconds)
        self.charge(plan, seconds)
        for unit in plan.units:
            unit.job.units_done += unit.image is not None
        finished = list(dict.fromkeys(unit.job for unit in plan.units if unit.job.is_finished))
        self.remove(finished)
        return finished

    def charge(self, plan: Plan, seconds: float) -> None:
        """Shares the time of a step among its jobs by tokens."""
        for unit in plan.units:
            unit.job.spent_seconds += seconds * unit.tokens / plan.tokens

    def estimated_wait(self, job: Job) -> float | None:
        """Seconds until the job starts; `None` when sizes ahead of it were never measured."""
        return self.estimates.wait(job, self._ahead(job))

    def load(self, newcomer: JobSpec, now: float) -> Load:
        """Tells how busy the device is, and how long a `newcomer` that arrived now would wait."""
        return Load(
            queued_count=self.queued_count,
            running_count=self.running_count,
            estimated_wait_seconds=self.estimated_wait(Job(newcomer, self._sequence, admitted_at=now)),
            capacity=max(1, self.budget.tokens // newcomer.image_tokens),
        )

    def _ahead(self, job: Job) -> list[Job]:
        return [other for other in self.jobs if other.order < job.order]

    def _fill(self, ready: Sequence[Job]) -> tuple[Unit, ...]:
        """Takes units in order while they fit; the first always does, and a small one may fill a gap."""
        units: list[Unit] = []
        tokens = 0
        for job in ready:
            for unit in self._cache_turns.units(job, units):
                if not self.budget.room(unit.tokens, len(units), tokens):
                    break
                self._cache_turns.take(unit)
                units.append(unit)
                tokens += unit.tokens
        return tuple(units)

    def _book_credit(self, plan: Plan, seconds: float) -> None:
        """Aged turns pay 1 − share, other steps earn the share, and at most one earning is kept."""
        earned = seconds * self.limits.aged_share
        if plan.is_aged_turn:
            self._aged_credit_seconds -= seconds - earned
        elif plan.passes_over:
            self._aged_credit_seconds = min(earned, self._aged_credit_seconds + earned)

    def _refuse_too_large(self, job: Job, spec: JobSpec) -> None:
        others = [other.spec.memory_bytes for other in self._jobs.values() if other is not job]
        if others and sum(others) + spec.memory_bytes > self.limits.memory_limit_bytes:
            what = "bytes for all requests' tensors are taken"
            raise QueueFull(self.limits.memory_limit_bytes, self._retry_seconds(), what)

    def _refuse_hopeless(self, job: Job, now: float) -> None:
        if job.spec.deadline is None:
            return
        behind = [other for other in self.jobs if other.order > job.order]
        needed = self.estimates.needed(job, self._ahead(job), behind)
        remaining = job.spec.deadline - now
        if needed is not None and needed > remaining:
            raise DeadlineUnreachable(remaining, needed)

    def _retry_seconds(self) -> float:
        left = [self.estimates.seconds_left(job) for job in self._jobs.values() if job.is_started]
        known = [seconds for seconds in left if seconds is not None]
        shortest, longest = RETRY_SECONDS
        return min(max(min(known, default=UNKNOWN_RETRY_SECONDS), shortest), longest)
