"""Watchdog: ends a stage's process whose device or thread hangs although its event loop turns."""

from __future__ import annotations

import faulthandler
import itertools
import logging
import math
import os
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from klein_services.runtime.metrics import WATCHDOG_HANGS

EXPECTED_FACTOR = 20
"""Work hangs when it takes so many times as long as expected."""
UNMEASURED_FACTOR = 20
"""Work of a kind or size that was never measured gets so many times the watchdog's seconds."""
STILL_FACTOR = 4
"""A process in which no Python thread has run for so many times the watchdog's seconds ends."""
GRACE_SECONDS = 3.0
"""Time between NOT_SERVING and the end, for clients to notice and other calls to finish."""
_TICK_SECONDS = 1.0
_SMOOTHING = 0.2
_log = logging.getLogger("klein.watchdog")


class WorkTimes:
    """Measured seconds of work by kind and size, for upper bounds rather than estimates."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, dict[int, float]] = defaultdict(dict)

    def observe(self, kind: str, size: float, seconds: float) -> None:
        """Records work that has ended well; `size` is at least 1."""
        times, size_class = self._seconds[kind], _size_class(size)
        average = times.get(size_class, seconds)
        times[size_class] = average + _SMOOTHING * (seconds - average)

    def expected(self, kind: str, size: float) -> float | None:
        """Returns the most that work of this size should take; `None` before any of its kind was measured.

        Work smaller than all that was measured counts as long as the smallest of it. Work that is larger counts as
        quadratic in its size, as attention is.
        """
        times = self._seconds.get(kind)
        if not times:
            return None
        wanted = _size_class(size)
        at_least = [size_class for size_class in times if size_class >= wanted]
        if at_least:
            return times[min(at_least)]
        largest = max(times)
        return times[largest] * math.pow(2, wanted - largest)


def _size_class(size: float) -> int:
    """Returns the class of a size; classes span half an octave."""
    return round(2 * math.log2(size))


@dataclass(eq=False)
class _Work:
    kind: str
    limit_seconds: float
    thread: int
    seconds: float = 0.0
    """Time that it ran while this process ran too: a stopped process does not hang."""


class Watchdog:
    """Thread that looks at the work in progress once a second.

    Args:
        stage: label of its metric.
        seconds: work may always take so long; see the factors above for what may take longer.
        on_hang: called once, on the watchdog's thread, when work hangs.
        end: called `GRACE_SECONDS` later.
    """

    def __init__(
        self, stage: str, seconds: float, on_hang: Callable[[], None], end: Callable[[], None]
    ) -> None:
        self._end = end
        self._stage = stage
        self._seconds = seconds
        self._on_hang = on_hang
        self._tick_seconds = min(_TICK_SECONDS, seconds / 10)
        self._times = WorkTimes()
        self._lock = threading.Lock()
        self._works: dict[int, _Work] = {}
        self._numbers = itertools.count()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Watches the work that begins from now on."""
        global _current
        _current = self
        self._expect_turns()
        self._thread.start()

    def stop(self) -> None:
        """Ends the watch."""
        global _current
        _current = None
        self._stopping.set()
        self._thread.join()

    def limit_seconds(self, kind: str, size: float) -> float:
        """Returns the time after which work hangs; `size` is 0 where it is not known."""
        with self._lock:
            expected = self._times.expected(kind, size) if size else None
        if expected is None:
            return self._seconds * UNMEASURED_FACTOR
        return max(self._seconds, EXPECTED_FACTOR * expected)

    @contextmanager
    def work(self, kind: str, size: float) -> Iterator[None]:
        """Watches the block, which runs on one thread; its time is measured when it ends well."""
        number, begun = next(self._numbers), time.monotonic()
        work = _Work(kind, self.limit_seconds(kind, size), threading.get_ident())
        with self._lock:
            self._works[number] = work
        try:
            yield
        finally:
            with self._lock:
                del self._works[number]
        if size:
            with self._lock:
                self._times.observe(kind, size, time.monotonic() - begun)

    def _watch(self) -> None:
        last = time.monotonic()
        try:
            while not self._stopping.wait(self._tick_seconds):
                self._expect_turns()
                now = time.monotonic()
                passed, last = min(now - last, 2 * self._tick_seconds), now
                if (hung := self._hung(passed)) is not None:
                    self._give_up(hung)
                    return
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _expect_turns(self) -> None:
        """Ends the process unless this is called again in time.

        Work in C code that keeps the interpreter's lock stops this thread, but not that of faulthandler.
        """
        faulthandler.dump_traceback_later(STILL_FACTOR * self._seconds, exit=True)

    def _hung(self, passed_seconds: float) -> _Work | None:
        """Adds the time that has passed, and returns work that is beyond its limit."""
        with self._lock:
            for work in self._works.values():
                work.seconds += passed_seconds
            return next((work for work in self._works.values() if work.seconds > work.limit_seconds), None)

    def _give_up(self, work: _Work) -> None:
        WATCHDOG_HANGS.labels(self._stage).inc()
        frame = sys._current_frames().get(work.thread)
        _log.critical(
            "%s hangs: it runs for %.0f s, and %.0f s are its limit (KLEIN_WATCHDOG_SECONDS); "
            "this process ends so that it is replaced",
            work.kind,
            work.seconds,
            work.limit_seconds,
            extra={"stack": [] if frame is None else traceback.format_stack(frame)},
        )
        self._on_hang()
        # The process may end by itself meanwhile, for example after a drain.
        if not self._stopping.wait(GRACE_SECONDS):
            self._end()


def end_process() -> None:
    """Ends this process at once: a thread that hangs would keep it alive."""
    logging.shutdown()
    os._exit(1)


_current: Watchdog | None = None
"""The watchdog of this process, once it serves and has one."""


@contextmanager
def watched(kind: str, size: float) -> Iterator[None]:
    """Has this process's watchdog, if it has one, watch the block.

    Args:
        kind: name of the work in times and log lines.
        size: amount that the work's time grows with, such as pixels or tokens; 0 where it is not known.
    """
    watchdog = _current
    if watchdog is None:
        yield
        return
    with watchdog.work(kind, size):
        yield
