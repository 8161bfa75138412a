"""Record: everything that a run of the closed loop saw, and what follows from it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from benchmarks.autoscaler import percentile

WINDOW_SECONDS = 10.0
"""Window of the latency percentiles."""
RECOVERED = 2.5
"""Most that the p95 may be in times of that before the step."""


@dataclass(frozen=True)
class Load:
    """Poisson arrivals: `base` a second, `peak` during the step, and `base` again."""

    base: float = 0.3
    peak: float = 2.5
    before_seconds: float = 50.0
    peak_seconds: float = 90.0
    after_seconds: float = 120.0

    def rate(self, elapsed: float) -> float:
        is_peak = self.before_seconds <= elapsed < self.before_seconds + self.peak_seconds
        return self.peak if is_peak else self.base

    @property
    def seconds(self) -> float:
        return self.before_seconds + self.peak_seconds + self.after_seconds


@dataclass
class Record:
    """Everything that a run saw, with seconds since its start."""

    mode: str
    load: Load
    target: float = math.nan
    """Backlog for each replica that the manifest allows, in seconds."""
    answers: list[tuple[float, float]] = field(default_factory=list)
    """Arrival and latency of each request."""
    failures: list[tuple[float, str]] = field(default_factory=list)
    desired: list[tuple[float, int]] = field(default_factory=list)
    serving: list[tuple[float, int]] = field(default_factory=list)
    values: list[tuple[float, float]] = field(default_factory=list)
    blind: tuple[float, float] | None = None
    """When Prometheus was stopped and started again."""
    exit_codes: list[int] = field(default_factory=list)
    """Of replicas that were scaled in."""
    cold_starts: list[float] = field(default_factory=list)
    """From a replica's start to SERVING."""

    def p95(self, begin: float, end: float) -> float:
        """Returns the 95th percentile of the latencies of requests that came in a window."""
        return percentile([latency for at, latency in self.answers if begin <= at < end], 0.95)

    @property
    def reaction_seconds(self) -> float:
        """From the step up to the first decision to add a replica."""
        step = self.load.before_seconds
        before = [count for at, count in self.desired if at <= step][-1]
        return next((at - step for at, count in self.desired if at > step and count > before), math.nan)

    @property
    def limit_seconds(self) -> float:
        """Largest latency that counts as recovered."""
        return RECOVERED * self.p95(0, self.load.before_seconds)

    @property
    def recovery_seconds(self) -> float:
        """From the step up until the p95 of every later window of the step is within the limit."""
        begin = self.load.before_seconds
        late = [
            number + 1
            for number in range(int(self.load.peak_seconds / WINDOW_SECONDS))
            if self.p95(begin + WINDOW_SECONDS * number, begin + WINDOW_SECONDS * (number + 1))
            > self.limit_seconds
        ]
        return WINDOW_SECONDS * max(late, default=0)

    @property
    def scale_in_seconds(self) -> float:
        """From the step down until one replica is wanted; NaN if more still are."""
        end = self.load.before_seconds + self.load.peak_seconds
        if self.desired[-1][1] > 1:
            return math.nan
        return max((at for at, count in self.desired if count > 1), default=end) - end

    @property
    def replica_seconds(self) -> float:
        """Time of replicas that the run asked for."""
        return sum(count * (then - at) for (at, count), (then, _) in itertools.pairwise(self.desired))

    @property
    def most(self) -> int:
        return max(count for _, count in self.desired)
