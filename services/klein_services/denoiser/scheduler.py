"""Scheduler: decides which work items form the next batch, and which requests are admitted. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from klein_services.denoiser.estimates import Estimates, StepBudget, StepTimes
from klein_services.denoiser.reference_kv_cache import ReferenceCaches
from klein_services.denoiser.scheduled_request import Batch, CacheSpec, ScheduledRequest, WorkItem
from klein_services.denoiser.silent_requests import SilentRequests, is_doubtful
from klein_services.runtime.admission import RetryTimes
from klein_services.runtime.errors import DeadlineUnreachable, QueueFull

UNKNOWN_RETRY_SECONDS = 1.0
"""Time until a place is free, as long as no step was measured."""
UNMEASURED_SECONDS = 1.0
"""Backlog of a request whose size was never measured, so that waiting work never looks like none."""


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits that the scheduler enforces."""

    queue_limit: int = 64
    """Most requests that wait for their first step."""
    token_budget: int = 0
    """Most tokens of one step; 0 means one image at a time. A larger single image runs alone."""
    step_image_limit: int = 64
    """Most images in one step."""
    memory_limit_bytes: int = 4 * 1024**3
    """Most bytes of all admitted requests' tensors; a single request may exceed it."""
    aging_seconds: float = 30.0
    """Time since admission after which a request counts as starving."""
    starving_share: float = 0.125
    """Share of device time for the oldest starving request, however urgent the others are."""
    silent_seconds: float = 10.0
    """Time until a request that has sent nothing after its spec is dropped; see `SilentRequests`."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Load of the device: its queue, and what a probe request would meet."""

    queued_count: int
    running_count: int
    estimated_wait_seconds: float | None
    """Time until a probe request would start; `None` when unknown."""
    capacity: int
    """Probe requests that fit into one step."""


class Scheduler:
    """Earliest deadline first within priority classes, first come first served among equals.

    The order is strict: a running request pauses at a step boundary for one that precedes it, and its tensors stay
    where they are. Since a strict order starves, the oldest starving request leads a batch whenever it has had less
    than `starving_share` of the device time since a batch first skipped it.

    A reference cache is computed as a work item, alone or next to others' steps within the token budget. While caches
    in use leave no room for it, its request waits and the others go on: see `CacheAdmission`.

    Not thread-safe: the engine holds its lock for every call.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        step_times: StepTimes | None = None,
        caches: ReferenceCaches[Any] | None = None,
        retry_times: RetryTimes | None = None,
    ) -> None:
        self.config = config
        self._silent = SilentRequests(config.queue_limit, config.silent_seconds)
        self._retry_times = retry_times or RetryTimes()
        self.caches = caches or ReferenceCaches[Any](0)
        self.budget = StepBudget(config.token_budget, config.step_image_limit)
        self.step_times = step_times or StepTimes()
        self.estimates = Estimates(self.step_times, self.budget, self.caches)
        self._cache_admission = CacheAdmission(self.caches)
        self._requests: dict[int, ScheduledRequest] = {}
        self._next_sequence = 0
        self._starvation_credit_seconds = 0.0

    @property
    def requests(self) -> tuple[ScheduledRequest, ...]:
        """All admitted requests that have not left, in the order of service."""
        return tuple(sorted(self._requests.values(), key=lambda request: request.sort_key))

    @property
    def queued_count(self) -> int:
        return sum(not request.is_started for request in self._requests.values())

    @property
    def running_count(self) -> int:
        return sum(request.is_started for request in self._requests.values())

    @property
    def backlog_seconds(self) -> float:
        """Device seconds that all admitted requests still need."""
        left = (self.estimates.seconds_left(request) for request in self._requests.values())
        return sum(UNMEASURED_SECONDS if seconds is None else seconds for seconds in left)

    def admit(self, request: ScheduledRequest, now: float) -> list[ScheduledRequest]:
        """Reserves a place in the queue; the request is scheduled only after `activate`.

        Returns:
            Silent requests that had to leave for it; see `SilentRequests`.

        Raises:
            QueueFull: the queue is full, or the tensors of admitted requests take all the memory allowed.
            DeadlineUnreachable: by measured step times, the request would end after its deadline.
        """
        if not self._requests:
            self._retry_times.forget()
        request.sequence, request.admitted_at = self._next_sequence, now
        staying, dropped = list(self._requests.values()), list[ScheduledRequest]()
        while (refusal := self._refusal(request, staying)) is not None:
            if (silent := self._silent.to_drop_for(request, staying, now)) is None:
                raise self._queue_full(*refusal, now)
            staying.remove(silent)
            dropped.append(silent)
        self._check_deadline(request, now)
        self.remove(dropped)
        self._next_sequence += 1
        self._requests[request.sequence] = request
        return dropped

    def received(self, request: ScheduledRequest) -> None:
        """Notes that tensors of an admitted request begin to arrive."""
        request.is_silent = False

    def activate(
        self,
        request: ScheduledRequest,
        now: float,
        *,
        image_tokens: int,
        memory_bytes: int = 0,
        cache: CacheSpec | None = None,
    ) -> None:
        """Makes an admitted request ready to be scheduled, with its actual cost, now that its tensors are here.

        Raises:
            QueueFull: with its references it takes more memory than the other requests leave.
            DeadlineUnreachable: by measured step times, the request would end after its deadline.
        """
        request.is_silent = False
        others = [other for other in self._requests.values() if other is not request]
        if (refusal := self._memory_refusal(memory_bytes, others)) is not None:
            raise self._queue_full(*refusal, now)
        request.image_tokens, request.memory_bytes, request.cache = image_tokens, memory_bytes, cache
        self._check_deadline(request, now)
        request.is_ready = True

    def cancel(self, request: ScheduledRequest) -> None:
        """Marks the request cancelled; the next `reap` removes it."""
        request.is_cancelled = True

    def reap(self, now: float) -> list[ScheduledRequest]:
        """Removes and returns cancelled and expired requests."""
        abandoned = [request for request in self._requests.values() if request.is_abandoned(now)]
        self.remove(abandoned)
        return abandoned

    def overdue(self, now: float) -> list[ScheduledRequest]:
        """Removes and returns requests that have sent nothing for too long."""
        overdue = self._silent.overdue(self._requests.values(), now)
        self.remove(overdue)
        return overdue

    def queue_full(self, now: float) -> QueueFull:
        """Returns the error of a request that had to leave for another one."""
        return self._queue_full(self.config.queue_limit, "requests wait", now)

    def remove(self, requests: Iterable[ScheduledRequest]) -> None:
        """Removes requests; no effect on those already removed."""
        for request in requests:
            self._requests.pop(request.sequence, None)

    def schedule(self, now: float) -> Batch | None:
        """Returns the next batch, or `None` when no request is ready."""
        ready = [request for request in self.requests if request.is_ready]
        if not ready:
            return None
        starving = sorted(
            (request for request in ready if now - request.admitted_at >= self.config.aging_seconds),
            key=lambda request: request.sequence,
        )
        due = starving if self._starvation_credit_seconds >= 0 else []
        self._cache_admission.reserve(ready, due)
        # The oldest starving request that can do work leads the batch, unless it is first anyway.
        lead = next((request for request in due if self._cache_admission.items(request)), None)
        if lead is ready[0]:
            lead = None
        items = self._fill(ready if lead is None else [lead, *(each for each in ready if each is not lead)])
        starting = tuple(dict.fromkeys(item.request for item in items if not item.request.is_started))
        for request in starting:
            request.started_at = now
        skips_starving = bool(starving) and all(item.request is not starving[0] for item in items)
        return Batch(items, starting, is_starving_turn=lead is not None, skips_starving=skips_starving)

    def on_step_done(self, batch: Batch, seconds: float) -> list[ScheduledRequest]:
        """Accounts for a batch that took `seconds`; removes and returns the requests that it finished."""
        self.step_times.observe([item.tokens for item in batch.items], seconds)
        # A starving turn pays 1 - share of its time, other steps earn the share; at most one earning is kept.
        earned = seconds * self.config.starving_share
        if batch.is_starving_turn:
            self._starvation_credit_seconds -= seconds - earned
        elif batch.skips_starving:
            self._starvation_credit_seconds = min(earned, self._starvation_credit_seconds + earned)
        for item in batch.items:
            item.request.spent_seconds += seconds * item.tokens / batch.tokens
            item.request.items_done += item.image is not None
        finished = list(dict.fromkeys(item.request for item in batch.items if item.request.is_finished))
        self.remove(finished)
        return finished

    def estimated_wait(self, request: ScheduledRequest) -> float | None:
        """Returns the seconds until the request starts; `None` when sizes ahead of it were never measured."""
        return self.estimates.wait(request, self._ahead(request))

    def load(self, probe: ScheduledRequest) -> Load:
        """Returns how busy the device is, and how long `probe` would wait if it were admitted now."""
        probe = dataclasses.replace(probe, sequence=self._next_sequence)
        return Load(
            queued_count=self.queued_count,
            running_count=self.running_count,
            estimated_wait_seconds=self.estimated_wait(probe),
            capacity=max(1, self.budget.tokens // probe.image_tokens),
        )

    def _fill(self, ready: Sequence[ScheduledRequest]) -> tuple[WorkItem, ...]:
        """Takes work items in order while they fit. The first always fits; later small ones may fill a gap."""
        items: list[WorkItem] = []
        tokens = 0
        for request in ready:
            for item in self._cache_admission.items(request, items):
                if not self.budget.room(item.tokens, len(items), tokens):
                    break
                self._cache_admission.acquire(item)
                items.append(item)
                tokens += item.tokens
        return tuple(items)

    def _ahead(self, request: ScheduledRequest) -> list[ScheduledRequest]:
        return [other for other in self.requests if other.sort_key < request.sort_key]

    def _refusal(
        self, request: ScheduledRequest, others: Sequence[ScheduledRequest]
    ) -> tuple[int, str] | None:
        """Returns the limit that keeps a request out next to `others`, and its unit; `None` when there is room."""
        if sum(not other.is_started for other in others) >= self.config.queue_limit:
            return self.config.queue_limit, "requests wait"
        return self._memory_refusal(request.memory_bytes, others)

    def _memory_refusal(
        self, memory_bytes: int, others: Sequence[ScheduledRequest]
    ) -> tuple[int, str] | None:
        limit = self.config.memory_limit_bytes
        if others and sum(other.memory_bytes for other in others) + memory_bytes > limit:
            return limit, "bytes for all requests' tensors are taken"
        return None

    def _check_deadline(self, request: ScheduledRequest, now: float) -> None:
        if request.deadline is None:
            return
        behind = [other for other in self.requests if other.sort_key > request.sort_key]
        ahead = [other for other in self._ahead(request) if not is_doubtful(other, now)]
        needed = self.estimates.needed(request, ahead, behind)
        remaining = request.deadline - now
        if needed is not None and needed > remaining:
            raise DeadlineUnreachable(remaining, needed)

    def _queue_full(self, limit: int, what: str, now: float) -> QueueFull:
        """Returns the refusal, with the time until a place is free for this request after those refused before it."""
        left = [self.estimates.seconds_left(each) for each in self._requests.values() if each.is_started]
        known = [seconds for seconds in left if seconds is not None]
        first_seconds = min(known, default=UNKNOWN_RETRY_SECONDS)
        interval = self.backlog_seconds / max(1, len(self._requests))
        return QueueFull(limit, self._retry_times.seconds(now, first_seconds, interval), what)


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
