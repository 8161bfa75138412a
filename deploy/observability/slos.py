"""Service level objectives: recorded rates of bad requests, and multi-window burn-rate conditions over them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deploy.observability.parameters import DAY, HOUR, MINUTE, Parameters

REQUESTS = "klein_request_duration_seconds"


@dataclass(frozen=True)
class BurnWindow:
    """A pair of windows: the long one shows that it matters, the short one that it still happens."""

    long_seconds: float
    short_seconds: float
    factor: float
    """Multiple of the rate that would use up the error budget of 30 days in exactly 30 days."""


FAST = (BurnWindow(HOUR, 5 * MINUTE, 14.4), BurnWindow(6 * HOUR, 30 * MINUTE, 6.0))
"""2 % of the budget within an hour, or 5 % within six: a page."""
SLOW = (BurnWindow(DAY, 2 * HOUR, 3.0), BurnWindow(3 * DAY, 6 * HOUR, 1.0))
"""10 % of the budget within a day or three days: it can wait until the morning."""


@dataclass(frozen=True)
class Slo:
    """An objective over the requests of a model."""

    name: str
    objective: float
    bad: str
    """PromQL of bad requests a second; `WINDOW` stands for a window."""
    valid: str
    """PromQL of all requests a second that count."""

    def condition(self, windows: tuple[BurnWindow, ...], parameters: Parameters) -> str:
        """Returns the PromQL that has a series for each model that burns its budget too fast."""
        return "\nor\n".join(self._burns(window, parameters) for window in windows)

    def _burns(self, window: BurnWindow, parameters: Parameters) -> str:
        limit = f"{window.factor * (1 - self.objective):.6g}"
        long, short = (parameters.window(seconds) for seconds in (window.long_seconds, window.short_seconds))
        selector = f'{{slo="{self.name}"}}'
        ratios = "\n  and\n".join(
            f"  klein:slo_bad:rate{each}{selector} / klein:slo_valid:rate{each}{selector} > {limit}"
            for each in (long, short)
        )
        count = f"{parameters.seconds(window.long_seconds):g} >= {parameters.minimum_count}"
        return f"(\n{ratios}\n  and\n  klein:slo_bad:rate{long}{selector} * {count}\n)"


def slos(parameters: Parameters) -> tuple[Slo, Slo]:
    """Returns availability and latency."""

    def rate(selector: str, suffix: str = "count") -> str:
        return f"sum {parameters.by('model')} (rate({REQUESTS}_{suffix}{{{selector}}}[WINDOW]))"

    succeeded = 'outcome="succeeded"'
    in_time = rate(f'{succeeded}, le="{float(parameters.latency_seconds)}"', "bucket")
    return (
        Slo(
            "availability",
            parameters.availability_objective,
            bad=rate('outcome="failed"'),
            valid=rate('outcome=~"succeeded|failed"'),
        ),
        Slo(
            "latency",
            parameters.latency_objective,
            bad=f"{rate(succeeded)} - {in_time}",
            valid=rate(succeeded),
        ),
    )


def recording_rules(parameters: Parameters) -> Iterator[dict[str, object]]:
    """Yields the rates of bad and of all valid requests in every window of every objective."""
    seconds = {each for window in (*FAST, *SLOW) for each in (window.long_seconds, window.short_seconds)}
    names = sorted({parameters.seconds(each): parameters.window(each) for each in seconds}.items())
    for slo in slos(parameters):
        for _, window in names:
            for part, expression in (("bad", slo.bad), ("valid", slo.valid)):
                yield {
                    "record": f"klein:slo_{part}:rate{window}",
                    "expr": expression.replace("WINDOW", window),
                    "labels": {"slo": slo.name},
                }
