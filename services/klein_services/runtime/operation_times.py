"""OperationTimes: measured seconds of operations by size. Torch-free."""

from __future__ import annotations

import math
from collections import defaultdict, deque

_SMOOTHING = 0.2
_RECENT_COUNT = 8
_LEAST_COUNT = 3
"""Measurements before a time is believed: the first of a size may include one-time work of the device."""
_LEAST_SIZE = 4096
"""Sizes below it cost the same: those of the smallest image."""


class OperationTimes:
    """Seconds of each operation, averaged exponentially by classes of half an octave of its size."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, dict[int, float]] = defaultdict(dict)
        self._recent: defaultdict[tuple[str, int], deque[float]] = defaultdict(
            lambda: deque(maxlen=_RECENT_COUNT)
        )
        self._mean: float | None = None

    @property
    def is_measured(self) -> bool:
        """Whether any operation was measured."""
        return self._mean is not None

    def observe(self, operation: str, size: int, seconds: float) -> None:
        """Records one operation."""
        times, size_class = self._seconds[operation], _size_class(size)
        average = times.get(size_class, seconds)
        times[size_class] = average + _SMOOTHING * (seconds - average)
        self._recent[operation, size_class].append(seconds)
        mean = seconds if self._mean is None else self._mean
        self._mean = mean + _SMOOTHING * (seconds - mean)

    def shortest(self, operation: str, size: int) -> float | None:
        """Returns the shortest of the last times of an operation of this size; `None` where few were measured."""
        recent = self._recent.get((operation, _size_class(size)), ())
        return min(recent) if len(recent) >= _LEAST_COUNT else None

    def expected(self, operation: str, size: int) -> float | None:
        """Returns a guess of the seconds of an operation; `None` before any operation was measured.

        Without a measurement of its class, the nearest class is scaled by size; without one of the operation, the mean
        of all others counts.
        """
        times = self._seconds.get(operation)
        if not times:
            return self._mean
        wanted = _size_class(size)
        nearest = min(times, key=lambda size_class: abs(size_class - wanted))
        return times[nearest] * math.pow(2, (wanted - nearest) / 2)


def _size_class(size: int) -> int:
    return round(2 * math.log2(max(size, _LEAST_SIZE)))
