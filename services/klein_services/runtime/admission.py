"""Bound on the number of requests that a server holds at once, and the times at which refused ones should come back."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from klein_services.runtime import metrics
from klein_services.runtime.errors import QueueFull

RETRY_SECONDS = (0.1, 60.0)
"""Bounds of a retry hint."""
JITTER = 0.3
"""Largest share by which a retry hint is shorter or longer than the time that it stands for."""
RESERVED_SHARE = 0.25
"""Share of a server's slots that only tenants with less than that share may take, so that one never holds all."""
_UNMEASURED_SECONDS = 1.0
"""Time that a request is assumed to hold its slot before any has left one."""
_WEIGHT = 0.2
"""Share of the newest measurement in an average."""


class RetryTimes:
    """Times at which refused requests are asked to come back: one request for each place that becomes free.

    One hint for all would bring all of them back at once, and all but one in vain. Each refused request therefore gets
    the time after the one before it, with jitter.

    Args:
        randomness: returns numbers in [0, 1).
    """

    def __init__(self, randomness: Callable[[], float] = random.random) -> None:
        self._randomness = randomness
        self._last = -math.inf

    def seconds(self, now: float, first_seconds: float, interval_seconds: float) -> float:
        """Returns the seconds after which a request that is refused now should come back, within `RETRY_SECONDS`.

        Args:
            now: time on any monotonic clock, always the same one.
            first_seconds: time until a place is likely to be free.
            interval_seconds: time from then on until another one is.
        """
        shortest, longest = RETRY_SECONDS
        self._last = min(max(now + first_seconds, self._last + interval_seconds), now + longest)
        jitter = 1 + JITTER * (2 * self._randomness() - 1)
        return min(max((self._last - now) * jitter, shortest), longest)

    def forget(self) -> None:
        """Starts anew: there is no work at all, so the requests that were asked to come back do not wait."""
        self._last = -math.inf


class ConcurrencyLimit:
    """A semaphore that never waits: a request that finds no free slot is refused at once.

    A worker's queue bounds only what waits for that worker. Requests that are still being received, or whose
    answer a slow client has not read, hold memory as well, and those are what this bounds.

    Args:
        limit: number of slots.
        stage: the `stage` label of its metrics; empty has none.
        clock: returns seconds.
        retry_times: chooses when refused requests should come back.
    """

    def __init__(
        self,
        limit: int,
        stage: str = "",
        *,
        clock: Callable[[], float] = time.monotonic,
        retry_times: RetryTimes | None = None,
    ) -> None:
        self.limit = limit
        self.in_use = 0
        """Slots that are taken."""
        self._reserve = int(limit * RESERVED_SHARE)
        self._held_by: Counter[str] = Counter()
        self._stage = stage
        self._clock = clock
        self._retry_times = retry_times or RetryTimes()
        self._held_seconds: float | None = None
        self._count()
        if stage:
            metrics.SLOTS.labels(stage).set(limit)

    @contextmanager
    def slot(self, tenant: str = "") -> Iterator[None]:
        """Holds a slot while the block runs.

        Args:
            tenant: name of a tenant, for which `RESERVED_SHARE` counts.

        Raises:
            QueueFull: all slots are taken, or those that this tenant may take.
        """
        taken_at = self._clock()
        has_share = bool(tenant) and self._held_by[tenant] >= self._reserve
        limit = self.limit - self._reserve if has_share else self.limit
        if self.in_use >= limit:
            raise QueueFull(limit, self._retry_seconds(taken_at))
        if not self.in_use:
            self._retry_times.forget()
        self.in_use += 1
        self._held_by[tenant] += 1
        self._count()
        try:
            yield
        finally:
            self.in_use -= 1
            self._held_by[tenant] -= 1
            if not self._held_by[tenant]:
                del self._held_by[tenant]
            self._count()
            held = self._clock() - taken_at
            mean = held if self._held_seconds is None else self._held_seconds
            self._held_seconds = mean + _WEIGHT * (held - mean)

    def _retry_seconds(self, now: float) -> float:
        held = _UNMEASURED_SECONDS if self._held_seconds is None else self._held_seconds
        interval = held / self.limit
        return self._retry_times.seconds(now, interval, interval)

    def _count(self) -> None:
        if self._stage:
            metrics.SLOTS_IN_USE.labels(self._stage).set(self.in_use)
