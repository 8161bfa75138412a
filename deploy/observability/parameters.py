"""Parameters of the rules: time scale, thresholds, the scope of an installation, and where the runbook is."""

from __future__ import annotations

from dataclasses import dataclass

from klein_services.runtime.metrics import REQUEST_BUCKETS

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
_UNITS = (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1))


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Values that an operator, or a test with little time, chooses.

    Raises:
        ValueError: a value cannot be used.
    """

    scope: tuple[str, ...] = ("namespace",)
    """Labels that distinguish installations; empty when one installation is spread over several namespaces."""
    runbook_base: str = "docs/runbook.md"
    """Address of the runbook, to which `#section` is added."""
    availability_objective: float = 0.999
    """Share of requests that must not fail, over 30 days."""
    latency_objective: float = 0.99
    """Share of successful requests that must be answered within `latency_seconds`, over 30 days."""
    latency_seconds: float = 5.0
    """A bucket edge of klein_request_duration_seconds."""
    minimum_count: int = 5
    """Fewest bad requests in a window that raise an alert: one failure at night is no trend."""
    load_seconds: float = 15 * MINUTE
    """Longest time that a replica may take to load its model."""
    time_scale: float = 1.0
    """Factor of all windows and waits; a test takes less than 1."""
    minimum_seconds: float = 0.0
    """Shortest window after scaling: four scrape intervals."""

    def __post_init__(self) -> None:
        if self.latency_seconds not in REQUEST_BUCKETS:
            edges = ", ".join(f"{edge:g}" for edge in REQUEST_BUCKETS)
            raise ValueError(
                f"latency_seconds is {self.latency_seconds:g}; it must be a bucket edge: {edges}"
            )
        for name in ("availability_objective", "latency_objective"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name):g}; it must be between 0 and 1")
        if self.time_scale <= 0:
            raise ValueError(f"time_scale is {self.time_scale:g}; it must be above 0")

    def by(self, *labels: str) -> str:
        """Returns the `by (…)` clause of an aggregation: the scope and more labels."""
        return f"by ({', '.join((*self.scope, *labels))})"

    def seconds(self, seconds: float) -> float:
        """Returns a window's length after scaling."""
        return max(seconds * self.time_scale, self.minimum_seconds)

    def window(self, seconds: float) -> str:
        """Returns a window as PromQL writes it."""
        return duration(self.seconds(seconds))

    def wait(self, seconds: float) -> str:
        """Returns the `for` of an alert; scaled, but without a shortest time."""
        return duration(seconds * self.time_scale)


def duration(seconds: float) -> str:
    """Returns a duration in Prometheus' notation, in its largest whole unit."""
    milliseconds = round(seconds * 1000)
    unit, size = next(each for each in _UNITS if milliseconds % each[1] == 0)
    return f"{milliseconds // size}{unit}"
