"""Bound on the number of requests that a server holds at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from klein_services.runtime import metrics
from klein_services.runtime.errors import QueueFull


class ConcurrencyLimit:
    """A semaphore that never waits: a request that finds no free slot is refused at once.

    A worker's queue bounds only what waits for that worker. Requests that are still being received, or whose
    answer a slow client has not read, hold memory as well, and those are what this bounds.

    Args:
        limit: number of slots.
        stage: the `stage` label of its metrics; empty has none.
    """

    def __init__(self, limit: int, stage: str = "") -> None:
        self.limit = limit
        self.in_use = 0
        """Slots that are taken."""
        self._stage = stage
        self._count()
        if stage:
            metrics.SLOTS.labels(stage).set(limit)

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Holds a slot while the block runs.

        Raises:
            QueueFull: all slots are taken.
        """
        if self.in_use >= self.limit:
            raise QueueFull(self.limit)
        self.in_use += 1
        self._count()
        try:
            yield
        finally:
            self.in_use -= 1
            self._count()

    def _count(self) -> None:
        if self._stage:
            metrics.SLOTS_IN_USE.labels(self._stage).set(self.in_use)
