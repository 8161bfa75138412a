"""A bound on how many requests a server carries at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from services.runtime.errors import QueueFull


class Places:
    """Refuses a request that finds no place, at once and before memory is taken for it.

    A worker's queue bounds only what waits for that worker; requests that are still received, or whose answer
    a slow caller has not taken, hold memory as well.

    Args:
        limit: most requests that hold a place.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken_count = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Holds a place for as long as the block runs.

        Raises:
            QueueFull: all are taken.
        """
        if self.taken_count >= self.limit:
            raise QueueFull(self.limit)
        self.taken_count += 1
        try:
            yield
        finally:
            self.taken_count -= 1
