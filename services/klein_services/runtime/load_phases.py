"""Phases of a start, from the first instruction of a process to its first request, and their stopwatch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Final

from klein_services.runtime import metrics

IMPORT: Final = "import"
"""The interpreter, its modules, settings and ports."""
READ_WEIGHTS: Final = "read_weights"
"""From files to the device, chunk by chunk, with the checks of their headers."""
WARM_UP: Final = "warm_up"
"""First computations, by which sizes are measured too."""
OTHER: Final = "other"
"""The rest: finding the device, building the network, the digest of the weights."""
PHASES: Final = (IMPORT, READ_WEIGHTS, WARM_UP, OTHER)


class LoadPhases:
    """Stopwatch of one start. Each moment belongs to one phase, so the phases add up to the whole.

    Used by one thread at a time: the main thread, and while the model loads, the thread that loads it.

    Args:
        begin: reading of `time.monotonic()` at which the first phase, `import`, began.
    """

    def __init__(self, begin: float) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._phase = IMPORT
        self._since = begin

    def enter(self, phase: str) -> str:
        """Begins a phase; returns the one that ends."""
        now, ended = time.monotonic(), self._phase
        self._seconds[ended] += now - self._since
        self._phase, self._since = phase, now
        return ended

    def report(self, stage: str) -> Mapping[str, float]:
        """Sets `klein_model_load_seconds` of every phase so far; returns the same."""
        self.enter(OTHER)
        for phase, seconds in self._seconds.items():
            metrics.LOAD_SECONDS.labels(stage, phase).set(seconds)
        return dict(self._seconds)


_loading: ContextVar[LoadPhases | None] = ContextVar("loading", default=None)
"""Stopwatch of the server whose model the current task or thread loads."""


def begin_load(began_at: float | None) -> LoadPhases:
    """Starts the stopwatch of a server whose model begins to load in this task.

    Args:
        began_at: reading of `time.monotonic()` when its process began; `None` for a server in another's process.
    """
    phases = LoadPhases(time.monotonic() if began_at is None else began_at)
    phases.enter(OTHER)
    _loading.set(phases)
    return phases


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Counts a block of the load to a phase."""
    phases = _loading.get()
    before = phases.enter(name) if phases else OTHER
    try:
        yield
    finally:
        if phases:
            phases.enter(before)


def process_began_at() -> float:
    """Returns the reading of `time.monotonic()` when this process began; now, where the system does not give it."""
    if not sys.platform.startswith("linux"):
        return time.monotonic()
    try:
        # The command's name, in parentheses, may contain spaces.
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age_seconds = max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)
    except (OSError, ValueError, IndexError):
        age_seconds = 0.0
    return time.monotonic() - age_seconds
