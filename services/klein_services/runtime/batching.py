"""Batching: how many works of one operation and shape a stage computes together. Torch-free."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from klein_services.runtime.errors import DeviceOutOfMemory, as_device_fault
from klein_services.runtime.settings import setting
from klein_services.runtime.stage_settings import StageSettings
from klein_services.runtime.work_queue import Batch

AUTOMATIC = "auto"
BATCH_PIXEL_COUNT = 1 << 20
"""Most pixels of the images of a batch, so that it takes no more memory and about the time of one of 1024²."""
PAYING_RATIO = 0.9
"""A batch pays when it takes at most this part of the time for each of its works that one of half its size takes."""
_REPEATS = 3
_log = logging.getLogger("klein.batching")


@dataclass(frozen=True, kw_only=True)
class BatchingSettings(StageSettings):
    """Settings of the stages that compute equal works together."""

    batch: str = setting(
        AUTOMATIC,
        help="Whether works of one shape are computed together; results then differ by rounding. auto: on a GPU, up "
        "to the size that paid in a measurement before serving; never on a CPU",
        choices=(AUTOMATIC, "on", "off"),
    )
    batch_size: int = setting(8, help="Works that are computed together at most", minimum=2, maximum=64)
    batch_wait_ms: float = setting(
        2.0,
        help="Milliseconds after its arrival for which a work waits for equal ones while nothing else waits",
        minimum=0,
        maximum=1000,
    )


@dataclass(frozen=True)
class BatchLimits:
    """Largest batches of works by their size."""

    count: int = 1
    """Works of a batch at most."""
    wait_seconds: float = 0.0
    measured: tuple[tuple[int, int], ...] | None = None
    """Pixels of one work and the works of a batch that paid, ascending; `None`: any size pays."""

    def batch(self, shape: Hashable, pixel_count: int = 0) -> Batch | None:
        """Returns the batch that a work may join; `None` when it is computed alone.

        Args:
            shape: works of equal shapes can be computed together.
            pixel_count: pixels of the work's image.
        """
        count = min(self.count, BATCH_PIXEL_COUNT // max(pixel_count, 1))
        if self.measured is not None:
            count = min(count, next((most for size, most in self.measured if size >= pixel_count), 1))
        return Batch(shape, count, self.wait_seconds) if count > 1 else None


def batch_limits(
    settings: BatchingSettings,
    device_type: str,
    compute: Callable[[int, int], object],
    pixel_counts: Sequence[int] = (0,),
) -> BatchLimits:
    """Returns the limits that the settings demand; measures first where they leave that open.

    Args:
        settings: of the stage.
        device_type: of its device, such as `cpu`.
        compute: computes a batch of so many works of so many pixels and waits for its end.
        pixel_counts: sizes to measure, ascending; larger works are computed alone.
    """
    wait_seconds = settings.batch_wait_ms / 1000
    if settings.batch == "off" or (settings.batch == AUTOMATIC and device_type == "cpu"):
        return BatchLimits()
    if settings.batch == "on":
        return BatchLimits(settings.batch_size, wait_seconds)
    measured = []
    for pixel_count in pixel_counts:
        most = min(settings.batch_size, BATCH_PIXEL_COUNT // max(pixel_count, 1))
        paying = _paying_count(lambda count, size=pixel_count: compute(count, size), most)  # type: ignore[misc]
        _log.info("works of %d pixels are computed together up to %d", pixel_count, paying)
        measured.append((pixel_count, paying))
    return BatchLimits(settings.batch_size, wait_seconds, tuple(measured))


def _paying_count(compute: Callable[[int], object], most: int) -> int:
    """Returns the works of the largest batch that pays: 1, or a power of two of at most `most`."""
    paying, seconds = 1, _shortest_seconds(compute, 1)
    while paying * 2 <= most:
        try:
            next_seconds = _shortest_seconds(compute, paying * 2) / (paying * 2)
        except Exception as error:
            if isinstance(as_device_fault(error), DeviceOutOfMemory):
                return paying
            raise
        if next_seconds > PAYING_RATIO * seconds:
            return paying
        paying, seconds = paying * 2, next_seconds
    return paying


def _shortest_seconds(compute: Callable[[int], object], count: int) -> float:
    """Returns the least of some times; the first run, which may include one-time work, does not count."""
    times = []
    for _ in range(1 + _REPEATS):
        begin = time.perf_counter()
        compute(count)
        times.append(time.perf_counter() - begin)
    return min(times[1:])
