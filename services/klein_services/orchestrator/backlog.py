"""Backlog: work of requests in progress that waits for the replicas of a stage or runs on them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from klein_services.orchestrator.routing import StageAddress

_WEIGHT = 0.2
"""Share of the newest measurement in an average."""
_Pool = tuple[str, str]


class PoolBacklog:
    """Work for the replicas behind one target, and how long such work takes.

    Times are what the stage reports with each result, averaged by operation and by size (classes of half an octave),
    in seconds per unit of size. Not measured sizes count like the nearest one.
    """

    def __init__(self) -> None:
        self._work: set[Work] = set()
        self._expected = 0
        self._rates: dict[str, dict[int, float]] = {}
        self._mean_seconds: float | None = None
        self._idle_since = -math.inf
        self.was_used = False
        """Whether there ever was any work."""

    @property
    def count(self) -> int:
        """Calls that wait or run, and requests that wait for the stage to answer at all."""
        return len(self._work) + self._expected

    def idle_seconds(self) -> float:
        """Returns the time since there was work; infinite when there never was any."""
        return 0.0 if self.count else time.monotonic() - self._idle_since

    def seconds(self, expected_seconds: float | None = None) -> float | None:
        """Returns the device time that all work still takes; `None` when some of it cannot be estimated.

        Args:
            expected_seconds: time of a call whose operation was never measured here.
        """
        total = 0.0
        for work in self._work:
            rates = self._rates.get(work.operation)
            if rates:
                wanted = _size_class(work.size)
                nearest = min(rates, key=lambda size_class: (abs(size_class - wanted), -size_class))
                total += rates[nearest] * work.size * work.share_left
            elif expected_seconds is None:
                return None
            else:
                total += expected_seconds * work.share_left
        if self._expected:
            each = expected_seconds if self._mean_seconds is None else self._mean_seconds
            if each is None:
                return None
            total += each * self._expected
        return total

    def add(self, work: Work) -> None:
        self._work.add(work)
        self.was_used = True

    def discard(self, work: Work) -> bool:
        """Removes work, and returns whether it was there."""
        was_there = work in self._work
        self._work.discard(work)
        self._idle_since = time.monotonic()
        return was_there

    def add_expected(self, count: int) -> None:
        """Adds requests that wait for the stage to answer, or removes them."""
        self._expected += count
        self._idle_since = time.monotonic()
        self.was_used = True

    def measured(self, work: Work, seconds: float) -> None:
        """Records that a stage computed all of a call's work in so many seconds of its device's time."""
        rates, size_class = self._rates.setdefault(work.operation, {}), _size_class(work.size)
        rate = seconds / work.size
        rates[size_class] = _averaged(rates.get(size_class), rate)
        self._mean_seconds = _averaged(self._mean_seconds, seconds)


class Backlog:
    """The backlog of every pool of replicas that the orchestrator calls."""

    def __init__(self) -> None:
        self._pools: dict[_Pool, PoolBacklog] = {}
        self._changed = asyncio.Event()

    def pool(self, address: StageAddress) -> PoolBacklog:
        """Returns the backlog of the replicas behind a stage's target, whatever routes share them."""
        return self._pools.setdefault((address.stage, address.target), PoolBacklog())

    def retain(self, addresses: Iterable[StageAddress]) -> None:
        """Forgets the pools that are not behind `addresses` and have no work."""
        kept = {(address.stage, address.target) for address in addresses}
        self._pools = {key: pool for key, pool in self._pools.items() if key in kept or pool.count}
        self.notify()

    async def change(self) -> None:
        """Waits until a pool gets its first work or loses its last, or `notify` is called."""
        await self._changed.wait()

    def notify(self) -> None:
        """Wakes everything that waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    @contextmanager
    def call(self, address: StageAddress, operation: str, size: float = 1.0) -> Iterator[Work]:
        """Yields the work of one call, which leaves the backlog when the block ends, however it ends."""
        work = Work(self, self.pool(address), operation, size)
        try:
            yield work
        finally:
            work.end()

    @contextmanager
    def expected(self, address: StageAddress) -> Iterator[None]:
        """Counts a request that waits for a stage to answer, while the block runs."""
        pool = self.pool(address)
        pool.add_expected(1)
        if pool.count == 1:
            self.notify()
        try:
            yield
        finally:
            pool.add_expected(-1)
            if not pool.count:
                self.notify()


@dataclass(eq=False)
class Work:
    """Work of one call to a stage.

    It counts from `begin` on: what a stage cannot compute yet, because another stage still makes its input, would need
    no replica of this one.
    """

    backlog: Backlog
    pool: PoolBacklog
    operation: str
    size: float = 1.0
    """Amount that the operation's time is about proportional to, such as pixels times steps; at least 1."""
    share_left: float = 1.0
    """Share that is not computed yet, from 1 down to 0."""

    def begin(self) -> None:
        """Adds the work: the stage has all of its input."""
        self.pool.add(self)
        if self.pool.count == 1:
            self.backlog.notify()

    def measured(self, seconds: float) -> None:
        """Records the device time that the finished call took."""
        self.pool.measured(self, seconds)

    def end(self) -> None:
        """Removes the work; no effect when it did not begin."""
        if self.pool.discard(self) and not self.pool.count:
            self.backlog.notify()


def _averaged(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _WEIGHT * (value - mean)


def _size_class(size: float) -> int:
    return round(2 * math.log2(size))
