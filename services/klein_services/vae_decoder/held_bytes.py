"""Bound on the bytes of image files and pixels that requests hold while they wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from klein_services.runtime import metrics
from klein_services.runtime.admission import RetryTimes
from klein_services.runtime.errors import QueueFull

ENCODING_SHARE = 0.75
"""Share of the bytes for images that are to be encoded; the rest is kept for decodes, whose images are denoised."""
PIXEL_BYTES = 4
"""Of a decoded RGB image that waits for the device."""
_UNMEASURED_SECONDS = 1.0
_WEIGHT = 0.2
"""Share of the newest measurement in an average."""


class HeldBytes:
    """Bytes that all requests hold, for the event loop's thread.

    Args:
        limit: most bytes; a request that is alone may hold more, which the limits of its files bound.
        stage: the `stage` label of its metric.
        clock: returns seconds.
        retry_times: chooses when refused requests should come back.
    """

    def __init__(
        self,
        limit: int,
        stage: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        retry_times: RetryTimes | None = None,
    ) -> None:
        self.limit = limit
        self.in_use = 0
        self._gauge = metrics.HELD_BYTES.labels(stage)
        self._holder_count = 0
        self._held_seconds = _UNMEASURED_SECONDS
        self._clock = clock
        self._retry_times = retry_times or RetryTimes()

    @contextmanager
    def request(self, share: float = 1.0) -> Iterator[RequestBytes]:
        """Yields what one request holds, nothing at first; gives it back when the block ends.

        Args:
            share: part of the limit at which this request is refused more.
        """
        held, begin = RequestBytes(self, int(self.limit * share)), self._clock()
        try:
            yield held
        finally:
            if held.count:
                seconds = self._clock() - begin
                self._held_seconds += _WEIGHT * (seconds - self._held_seconds)
            held.release(held.count)

    def change(self, held: RequestBytes, count: int) -> None:
        """Adds bytes to a request's, or takes them away."""
        self._holder_count -= bool(held.count)
        held.count += count
        self._holder_count += bool(held.count)
        self.in_use += count
        self._gauge.set(self.in_use)

    def refusal(self, limit: int) -> QueueFull:
        """Returns the error for a request that may not hold more."""
        interval = self._held_seconds / max(self._holder_count, 1)
        seconds = self._retry_times.seconds(self._clock(), interval, interval)
        return QueueFull(limit, seconds, "bytes of images wait")


class RequestBytes:
    """Bytes that one request holds."""

    def __init__(self, all_bytes: HeldBytes, limit: int) -> None:
        self.count = 0
        self._all = all_bytes
        self._limit = limit

    def add(self, count: int) -> None:
        """Takes bytes.

        Raises:
            QueueFull: with them, this request and others would hold too many; nothing is taken.
        """
        others = self._all.in_use - self.count
        if others and self._all.in_use + count > self._limit:
            raise self._all.refusal(self._limit)
        self._all.change(self, count)

    def release(self, count: int) -> None:
        """Gives bytes back."""
        self._all.change(self, -count)
