"""Scheduler: decides which work items form the next batch, and which requests are admitted. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from klein_services.denoiser.cache_admission import CacheAdmission
from klein_services.denoiser.estimates import Estimates, StepBudget, StepTimes
from klein_services.denoiser.reference_kv_cache import ReferenceCaches
from klein_services.denoiser.scheduled_request import Batch, CacheSpec, ScheduledRequest, WorkItem
from klein_services.denoiser.service_order import ServiceOrder
from klein_services.denoiser.silent_requests import SilentRequests, is_doubtful
from klein_services.runtime.admission import RetryTimes
from klein_services.runtime.displacement import to_displace
from klein_services.runtime.errors import DeadlineUnreachable, QueueFull

UNKNOWN_RETRY_SECONDS = 1.0
"""Time until a place is free, as long as no step was measured."""
UNMEASURED_SECONDS = 1.0
"""Cost of a request whose size was never measured, so that waiting work never looks like none."""


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
    """Chooses batches in the order of `ServiceOrder`: by class, then fairly between callers, then by deadline.

    A running request pauses at a step boundary for one that precedes it, and its tensors stay where they are. Since
    strict classes and deadlines starve, the oldest starving request leads a batch whenever it has had less than
    `starving_share` of the device time since a batch first skipped it. Requests that only wait for their caller's turn
    do not starve: others of their class share with them.

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
        self._order = ServiceOrder(self._cost)
        self._requests: dict[int, ScheduledRequest] = {}
        self._sorted: tuple[ScheduledRequest, ...] | None = ()
        """`requests`, until the order may have changed."""
        self._next_sequence = 0
        self._starvation_credit_seconds = 0.0

    @property
    def requests(self) -> tuple[ScheduledRequest, ...]:
        """All admitted requests that have not left, in the order of service if no other comes."""
        if self._sorted is None:
            self._sorted = tuple(self._order.sort(self._requests.values()))
        return self._sorted

    @property
    def queued_count(self) -> int:
        return sum(not request.is_started for request in self._requests.values())

    @property
    def running_count(self) -> int:
        return sum(request.is_started for request in self._requests.values())

    @property
    def backlog_seconds(self) -> float:
        """Device seconds that all admitted requests still need."""
        return sum(map(self._cost, self._requests.values()))

    def admit(self, request: ScheduledRequest, now: float) -> list[ScheduledRequest]:
        """Reserves a place in the queue; the request is scheduled only after `activate`.

        Returns:
            Requests that had to leave for it: silent ones, see `SilentRequests`, or one of a caller with many places,
            see `to_displace`.

        Raises:
            QueueFull: the queue is full, or the tensors of admitted requests take all the memory allowed.
            DeadlineUnreachable: by measured step times, the request would end after its deadline.
        """
        if not self._requests:
            self._retry_times.forget()
        request.sequence = request.place = self._next_sequence
        request.admitted_at = now
        if request.is_resumed:
            # Its caller has waited for it once.
            waiting = (other.place for other in self._requests.values() if not other.is_started)
            request.place = min(waiting, default=request.sequence) - 0.5
        staying, dropped = list(self._requests.values()), list[ScheduledRequest]()
        while (refusal := self._refusal(request, staying)) is not None:
            # Requests that were resumed have waited once.
            movable = (other for other in staying if not (other.is_started or other.is_resumed))
            leaving = self._silent.to_drop_for(request, staying, now) or to_displace(request, movable)
            if leaving is None:
                raise self._queue_full(*refusal, now)
            staying.remove(leaving)
            dropped.append(leaving)
        self._check_deadline(request, now)
        self.remove(dropped)
        self._next_sequence += 1
        self._requests[request.sequence] = request
        self._sorted = None
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
        self._sorted = None
        self._check_deadline(request, now)
        request.is_ready = True
        self._order.add(request)

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
            if self._requests.pop(request.sequence, None) is not None:
                self._order.remove(request)
                self._sorted = None

    def schedule(self, now: float) -> Batch | None:
        """Returns the next batch, or `None` when no request is ready."""
        ready = self._order.sort(request for request in self._requests.values() if request.is_ready)
        if not ready:
            return None
        starving = self._starving(ready, now)
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
        for request in dict.fromkeys(item.request for item in items):
            self._order.begin(request)
        self._sorted = None
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
            item.request.items_done += item.image is not None
            self._order.account(item.request, seconds * item.tokens / batch.tokens)
        self._sorted = None
        finished = list(dict.fromkeys(item.request for item in batch.items if item.request.is_finished))
        self.remove(finished)
        return finished

    def estimated_wait(self, request: ScheduledRequest) -> float | None:
        """Returns the seconds until the request starts; `None` when sizes ahead of it were never measured."""
        return self.estimates.wait(request, self._around(request)[0])

    def estimated_seconds(self, request: ScheduledRequest, now: float) -> float | None:
        """Returns the seconds until a request ends that has not started; `None` if its size was never measured.

        Requests that may never send their tensors count as absent.
        """
        before, behind = self._around(request)
        return self.estimates.needed(
            request, [other for other in before if not is_doubtful(other, now)], behind
        )

    def load(self, probe: ScheduledRequest) -> Load:
        """Returns how busy the device is, and how long `probe` would wait if its caller sent it now."""
        probe = dataclasses.replace(probe, sequence=self._next_sequence, place=self._next_sequence)
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

    def _starving(self, ready: Sequence[ScheduledRequest], now: float) -> list[ScheduledRequest]:
        """Returns the starving requests that may lead a batch, the oldest first.

        Args:
            ready: requests that may be in the batch, in the order of service.
            now: time on the engine's clock.
        """
        aged = [request for request in ready if now - request.admitted_at >= self.config.aging_seconds]
        first = {request.urgency: request for request in reversed(ready)}
        # Within a class the callers share. Only the one whose turn it is gets the share of the class.
        leads = {request for request in aged if request.caller.name == first[request.urgency].caller.name}
        leads.update(first[request.urgency] for request in aged)
        return sorted(leads, key=lambda request: request.sequence)

    def _around(self, request: ScheduledRequest) -> tuple[list[ScheduledRequest], list[ScheduledRequest]]:
        """Returns the requests that are served before and after one that need not be admitted yet."""
        if request in self._requests.values():
            order = list(self.requests)
        else:
            order = self._order.sort([*self._requests.values(), request])
        place = order.index(request)
        return order[:place], order[place + 1 :]

    def _cost(self, request: ScheduledRequest) -> float:
        seconds = self.estimates.seconds_left(request)
        return UNMEASURED_SECONDS if seconds is None else seconds

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
        needed, remaining = self.estimated_seconds(request, now), request.deadline - now
        if needed is not None and needed > remaining:
            raise DeadlineUnreachable(remaining, needed)

    def _queue_full(self, limit: int, what: str, now: float) -> QueueFull:
        """Returns the refusal, with the time until a place is free for this request after those refused before it."""
        left = [self.estimates.seconds_left(each) for each in self._requests.values() if each.is_started]
        known = [seconds for seconds in left if seconds is not None]
        first_seconds = min(known, default=UNKNOWN_RETRY_SECONDS)
        interval = self.backlog_seconds / max(1, len(self._requests))
        return QueueFull(limit, self._retry_times.seconds(now, first_seconds, interval), what)
