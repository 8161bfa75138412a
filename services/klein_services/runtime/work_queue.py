"""WorkQueue: the order in which a worker runs what waits for it, and the bounds on that. Torch-free."""

from __future__ import annotations

import heapq
import math
import random
from bisect import insort
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from klein_services.runtime.admission import RetryTimes
from klein_services.runtime.caller import Caller
from klein_services.runtime.displacement import to_displace
from klein_services.runtime.errors import DeadlineUnreachable, QueueFull
from klein_services.runtime.fair_shares import FairShares
from klein_services.runtime.operation_times import OperationTimes
from klein_services.runtime.urgency import Urgency

LARGE_PIXEL_COUNT = 4 << 20
"""Work of more pixels is large: where several threads work, only one of them does large work."""
PATIENCE_SECONDS = 60.0
"""Work without an earlier deadline is due so long after its arrival, so that later work cannot starve it."""
AGING_SECONDS = 30.0
"""Time after which waiting work lets its class have a share of the time, however urgent other classes are."""
STARVING_SHARE = 0.125
"""That share."""
UNMEASURED_SECONDS = 1.0
"""Cost of work before any operation was measured, so that waiting work never looks like none."""


@dataclass(frozen=True)
class Batch:
    """Works that can be computed together: those of one operation whose batches are equal."""

    shape: Hashable
    count: int
    """Works that are computed together at most."""
    wait_seconds: float
    """Time after its arrival for which a work waits for others to join, while nothing else waits."""


@dataclass(eq=False, kw_only=True)
class Work:
    """One operation as the queue sees it: its cost, its urgency and its caller. Times are of `time.monotonic()`."""

    operation: str = ""
    """Operations of one name and size take about the same time; empty is not measured."""
    pixel_count: int = 0
    urgency: Urgency = Urgency.STANDARD
    caller: Caller
    deadline: float | None = None
    queued_at: float
    batch: Batch | None = None
    """What it may be computed with; `None` is nothing else."""

    sequence: int = 0
    """Order of arrival."""
    cost_seconds: float = 0.0
    """What its caller was charged when it began."""
    started_at: float | None = None
    is_starving_turn: bool = False
    """Whether it goes ahead of more urgent classes because its own is starving."""
    skips_starving: bool = False
    """Whether it goes ahead of a class that is starving."""

    @property
    def due(self) -> tuple[float, int]:
        """Order among the work of one caller and class."""
        patience_ends = self.queued_at + PATIENCE_SECONDS
        return (patience_ends if self.deadline is None else min(self.deadline, patience_ends), self.sequence)

    @property
    def is_large(self) -> bool:
        return self.pixel_count > LARGE_PIXEL_COUNT

    def goes_with(self, other: Work) -> bool:
        """Returns whether both can be computed together."""
        return (
            self.batch is not None
            and self.batch == other.batch
            and (self.operation, self.urgency) == (other.operation, other.urgency)
        )


_Work = TypeVar("_Work", bound=Work)


class WorkQueue(Generic[_Work]):
    """Strict priority classes; within a class callers share fairly; work of one caller goes earliest deadline first.

    A strict order of classes starves, so a class whose oldest work has waited for `AGING_SECONDS` gets a turn whenever
    it has had less than `STARVING_SHARE` of the time since another class first went ahead of it.

    Not thread-safe: the worker holds its lock for every call.

    Args:
        call_limit: most works that wait or run beyond one for each thread.
        pixel_limit: most pixels of large works that wait or run; one alone may exceed it. 0 is no limit.
        thread_count: threads that take work.
        randomness: returns numbers in [0, 1) for the retry hints of refused work.
    """

    def __init__(
        self,
        call_limit: int,
        pixel_limit: int = 0,
        thread_count: int = 1,
        randomness: Callable[[], float] = random.random,
    ) -> None:
        self.call_limit = call_limit
        self.pixel_limit = pixel_limit
        self.times = OperationTimes()
        self.running: dict[int, _Work] = {}
        """Works that were taken and are not done, by sequence."""
        self._thread_count = thread_count
        self._classes: dict[Urgency, _ClassQueue[_Work]] = {urgency: _ClassQueue() for urgency in Urgency}
        self._next_sequence = 0
        self._starvation_credit_seconds = 0.0
        self._retry_times = RetryTimes(randomness)
        self._large_retry_times = RetryTimes(randomness)

    def __len__(self) -> int:
        """Works that wait."""
        return sum(len(each.arrivals) for each in self._classes.values())

    def __iter__(self) -> Iterator[_Work]:
        """Yields what waits, in the order of service if nothing else comes."""
        for each in self._classes.values():
            yield from each.order(self._expected_seconds)

    @property
    def large_pixel_count(self) -> int:
        """Pixels of large works that wait or run."""
        return sum(work.pixel_count for work in self._outstanding() if work.is_large)

    @property
    def backlog_seconds(self) -> float:
        """Seconds of one thread that waiting and running works take."""
        return sum(map(self._expected_seconds, self._outstanding()))

    def add(self, work: _Work, now: float) -> _Work | None:
        """Adds work.

        Returns:
            Work of a caller with many places that had to leave for it; see `to_displace`.

        Raises:
            QueueFull: too many works, or pixels of large ones, wait.
            DeadlineUnreachable: by measured times, the work would end after its deadline.
        """
        displaced = None
        if len(self) + len(self.running) >= self.call_limit + self._thread_count:
            displaced = to_displace(work, self)
            if displaced is None:
                raise self.full(now)
        if not (self.running or len(self)):
            self._retry_times.forget()
        pixel_count = self.large_pixel_count
        if not pixel_count:
            self._large_retry_times.forget()
        if self.pixel_limit and work.is_large and 0 < pixel_count > self.pixel_limit - work.pixel_count:
            large = (other for other in self._outstanding() if other.is_large)
            retry_seconds = self._retry_seconds(now, self._large_retry_times, large)
            raise QueueFull(self.pixel_limit, retry_seconds, "pixels of large images wait")
        work.sequence = self._next_sequence
        self._next_sequence += 1
        work_class = self._classes[work.urgency]
        work_class.add(work)
        try:
            self._check_deadline(work, now)
        except DeadlineUnreachable:
            work_class.remove(work)
            raise
        if displaced is not None:
            self.remove(displaced)
        return displaced

    def full(self, now: float) -> QueueFull:
        """Returns the refusal of work that finds no place."""
        return QueueFull(self.call_limit, self._retry_seconds(now, self._retry_times, self._outstanding()))

    def remove(self, work: _Work) -> None:
        """Removes work that waits; no effect on other work."""
        self._classes[work.urgency].remove(work)

    def clear(self) -> list[_Work]:
        """Removes and returns all that waits."""
        works = list(self)
        for work in works:
            self.remove(work)
        return works

    def take(self, now: float) -> _Work | None:
        """Takes the work that runs next; `None` when none may run now."""
        allow_large = self._thread_count == 1 or not any(work.is_large for work in self.running.values())
        waiting = [each for each in self._classes.values() if each.first(allow_large) is not None]
        if not waiting:
            return None
        starving = [each for each in waiting[1:] if now - each.oldest_queued_at >= AGING_SECONDS]
        chosen = waiting[0]
        if starving and self._starvation_credit_seconds >= 0:
            chosen = min(starving, key=lambda each: each.oldest_queued_at)
        work = chosen.first(allow_large)
        if work is None:
            raise AssertionError("a class that has work gives none")
        work.is_starving_turn = chosen is not waiting[0]
        work.skips_starving = bool(starving) and not work.is_starving_turn
        self._begin(work, now)
        return work

    def take_batch(self, now: float) -> list[_Work]:
        """Takes the work that runs next and those that follow it in its class and can be computed with it.

        A work of another shape ends the batch, so none is delayed by works behind it. Returns no work when none may run
        now.
        """
        first = self.take(now)
        works = [] if first is None else [first]
        while first is not None and first.batch is not None and len(works) < first.batch.count:
            other = self._classes[first.urgency].first(allow_large=True)
            if other is None or not other.goes_with(first):
                break
            other.is_starving_turn, other.skips_starving = first.is_starving_turn, first.skips_starving
            self._begin(other, now)
            works.append(other)
        return works

    def hold_seconds(self, now: float) -> float:
        """Returns how long the work that runs next should wait for others to join it.

        0 as soon as anything waits that it cannot be computed with.
        """
        waiting = [work for each in self._classes.values() for work in each.arrivals.values()]
        first = waiting[0] if waiting else None
        if first is None or first.batch is None or len(waiting) >= first.batch.count:
            return 0.0
        if not all(work.goes_with(first) for work in waiting):
            return 0.0
        return max(min(map(self._hold_ends_at, waiting)) - now, 0.0)

    def done(self, work: _Work, seconds: float, *, is_measured: bool) -> None:
        """Accounts for work that was taken and took `seconds`; `is_measured` also keeps its time for estimates."""
        del self.running[work.sequence]
        if is_measured:
            self.times.observe(work.operation, work.pixel_count, seconds)
        # A starving turn pays 1 - share of its time, other works earn the share; at most one earning is kept.
        earned = seconds * STARVING_SHARE
        if work.is_starving_turn:
            self._starvation_credit_seconds -= seconds - earned
        elif work.skips_starving:
            self._starvation_credit_seconds = min(earned, self._starvation_credit_seconds + earned)
        self._classes[work.urgency].shares.correct(work.caller, seconds - work.cost_seconds)

    def put_back(self, work: _Work) -> None:
        """Lets work that is done wait again, at its old place in the order, to run alone."""
        work.batch = work.started_at = None
        self._classes[work.urgency].put_back(work)

    def _begin(self, work: _Work, now: float) -> None:
        work.started_at, work.cost_seconds = now, self._expected_seconds(work)
        self._classes[work.urgency].begin(work)
        self.running[work.sequence] = work

    def _hold_ends_at(self, work: _Work) -> float:
        """Returns the time until which a work may wait for others to join it."""
        if work.batch is None:
            return work.queued_at
        wait_seconds = work.batch.wait_seconds
        if work.deadline is not None:
            # At most half of the time that it can spare.
            spare_seconds = work.deadline - work.queued_at - self._expected_seconds(work)
            wait_seconds = min(wait_seconds, spare_seconds / 2)
        return work.queued_at + wait_seconds

    def _outstanding(self) -> Iterator[_Work]:
        yield from self.running.values()
        for each in self._classes.values():
            yield from each.arrivals.values()

    def _expected_seconds(self, work: Work) -> float:
        seconds = self.times.expected(work.operation, work.pixel_count)
        return UNMEASURED_SECONDS if seconds is None else seconds

    def _check_deadline(self, work: _Work, now: float) -> None:
        own = self.times.shortest(work.operation, work.pixel_count)
        # With nothing else to do, trying costs nothing, and it corrects times that were measured too long.
        if work.deadline is None or own is None or not (self.running or len(self) > 1):
            return
        remaining = work.deadline - now
        # Only what stands in its way: with several threads, small work passes large work.
        is_split = self._thread_count > 1
        ahead = 0.0
        for other in self.running.values():
            if other.is_large == work.is_large or not is_split:
                spent = now - (other.started_at or now)
                ahead += max(self._shortest_seconds(other) - spent, 0.0)
        for other in self:
            if other is work:
                break
            if other.is_large == work.is_large or not is_split:
                ahead += self._shortest_seconds(other)
        needed = own + ahead / (1 if work.is_large else self._thread_count)
        if needed > remaining:
            raise DeadlineUnreachable(max(remaining, 0.0), needed)

    def _shortest_seconds(self, work: Work) -> float:
        """Returns the seconds of a work ahead; unmeasured ones count as 0, so that none is refused on a guess."""
        return self.times.shortest(work.operation, work.pixel_count) or 0.0

    def _retry_seconds(self, now: float, line: RetryTimes, works: Iterable[_Work]) -> float:
        """Returns the seconds after which refused work should come back: the next place in line that becomes free.

        Args:
            line: the places that were promised.
            works: waiting and running works whose ends make places.
        """
        seconds, until_first, thread_count = [], math.inf, 0
        for work in works:
            seconds.append(self._expected_seconds(work))
            if work.started_at is not None:
                thread_count += 1
                until_first = min(until_first, max(seconds[-1] - (now - work.started_at), 0.0))
        interval = sum(seconds) / len(seconds) / max(thread_count, 1)
        return line.seconds(now, interval if until_first == math.inf else until_first, interval)


@dataclass
class _ClassQueue(Generic[_Work]):
    """Waiting works of one priority class."""

    shares: FairShares = field(default_factory=FairShares)
    arrivals: dict[int, _Work] = field(default_factory=dict)
    """By sequence, the oldest first."""
    _flows: dict[str, list[_Work]] = field(default_factory=dict)
    """By caller, in the order of service."""

    @property
    def oldest_queued_at(self) -> float:
        return next((work.queued_at for work in self.arrivals.values()), math.inf)

    def add(self, work: _Work) -> None:
        self.arrivals[work.sequence] = work
        insort(self._flows.setdefault(work.caller.name, []), work, key=lambda each: each.due)

    def put_back(self, work: _Work) -> None:
        self.add(work)
        self.arrivals = dict(sorted(self.arrivals.items()))

    def remove(self, work: _Work) -> None:
        if self.arrivals.pop(work.sequence, None) is None:
            return
        flow = self._flows[work.caller.name]
        flow.remove(work)
        if not flow:
            del self._flows[work.caller.name]

    def first(self, allow_large: bool) -> _Work | None:
        """Returns the work that goes next."""
        heads = (_head(flow, allow_large) for flow in self._flows.values())
        return min((head for head in heads if head is not None), key=self._precedence, default=None)

    def begin(self, work: _Work) -> None:
        """Removes work that begins and charges its caller."""
        self.remove(work)
        self.shares.begin(work.caller, work.cost_seconds)
        if not self.arrivals:
            self.shares.forget()

    def order(self, cost: Callable[[Work], float]) -> Iterator[_Work]:
        """Yields all works in the order of service if nothing else comes."""
        heads = [(*self._precedence(flow[0]), name, 0) for name, flow in self._flows.items()]
        heapq.heapify(heads)
        while heads:
            tag, _, name, index = heapq.heappop(heads)
            flow = self._flows[name]
            work = flow[index]
            yield work
            if index + 1 < len(flow):
                following = tag + cost(work) / work.caller.weight
                heapq.heappush(heads, (following, flow[index + 1].due, name, index + 1))

    def _precedence(self, work: _Work) -> tuple[float, tuple[float, int]]:
        return (self.shares.tag(work.caller.name), work.due)


def _head(flow: Iterable[_Work], allow_large: bool) -> _Work | None:
    return next((work for work in flow if allow_large or not work.is_large), None)
