"""Records of `benchmarks.serve`: what became of every request of one load, and the numbers that follow from it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from benchmarks.autoscaler import percentile
from benchmarks.serve_targets import Use

OUTCOMES = ("succeeded", "refused", "expired", "failed")
"""What became of requests; expired ones got no answer before their deadline."""
CENTILES = (0.5, 0.95, 0.99)


@dataclass(frozen=True)
class Answer:
    """What became of one request."""

    kind: str
    urgency: str
    at_seconds: float
    """When it was due, since the begin of the load."""
    seconds: float
    """From then until its end, so that a late start counts."""
    outcome: str


@dataclass
class Record:
    """One contender under one load."""

    contender: str
    load: str
    seconds: float
    """Until the last request ended."""
    answers: Sequence[Answer]
    use: Mapping[str, Use] = field(default_factory=dict)

    @property
    def goodput(self) -> float:
        """Images a second that came within their deadlines."""
        return self.counts["succeeded"] / self.seconds

    @property
    def counts(self) -> Counter[str]:
        return Counter(answer.outcome for answer in self.answers)

    def latency(self, share: float, urgency: str = "") -> float:
        """Returns a percentile of the seconds of succeeded requests, of one class or all; NaN without any."""
        chosen = [
            answer.seconds
            for answer in self.answers
            if answer.outcome == "succeeded" and urgency in ("", answer.urgency)
        ]
        return percentile(chosen, share) if chosen else math.nan

    def within(self, urgency: str) -> float:
        """Returns the share of a class's requests that succeeded; NaN without any."""
        chosen = [answer.outcome for answer in self.answers if answer.urgency == urgency]
        return chosen.count("succeeded") / len(chosen) if chosen else math.nan

    @property
    def cpu_seconds_per_image(self) -> float:
        """Processor time of all parts for each image in time; NaN where it is not known."""
        cpu_seconds = sum(use.cpu_seconds for use in self.use.values())
        return (
            cpu_seconds / self.counts["succeeded"] if cpu_seconds and self.counts["succeeded"] else math.nan
        )

    def summary(self) -> dict[str, object]:
        """Returns everything as JSON has it; what is not known is null."""
        urgencies = sorted({answer.urgency for answer in self.answers})
        return {
            "contender": self.contender,
            "load": self.load,
            "seconds": self.seconds,
            "goodput": self.goodput,
            "outcomes": {outcome: self.counts[outcome] for outcome in OUTCOMES},
            "latency_seconds": {
                urgency or "all": {
                    f"p{share * 100:g}": _known(self.latency(share, urgency)) for share in CENTILES
                }
                for urgency in ("", *urgencies)
            },
            "cpu_seconds_per_image": _known(self.cpu_seconds_per_image),
            "answered_in_time": {urgency: self.within(urgency) for urgency in urgencies},
            "use": {
                name: asdict(use)
                | {
                    "utilization": use.busy_seconds / (self.seconds * use.replica_count),
                    "cores": use.cpu_seconds / self.seconds,
                }
                for name, use in self.use.items()
            },
            "answers": [asdict(answer) for answer in self.answers],
        }


def table(records: Sequence[Record]) -> str:
    """Returns the records as a table of Markdown."""
    columns: list[tuple[str, Callable[[Record], str]]] = [
        ("load", lambda record: record.load),
        ("contender", lambda record: record.contender),
        ("images/s in time", lambda record: f"{record.goodput:.2f}"),
        ("in time / refused / late / failed", _outcomes),
        ("p50 / p95 / p99, s", lambda record: " / ".join(_shown(record.latency(s)) for s in CENTILES)),
        (
            "interactive p50 / p95, s",
            lambda record: " / ".join(_shown(record.latency(share, "interactive")) for share in CENTILES[:2]),
        ),
        ("busy", _busy),
        ("CPU s an image", lambda record: _shown(record.cpu_seconds_per_image)),
    ]
    rows = [[shown(record) for _, shown in columns] for record in records]
    lines = [[name for name, _ in columns], ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _outcomes(record: Record) -> str:
    return " / ".join(str(record.counts[outcome]) for outcome in OUTCOMES)


def _busy(record: Record) -> str:
    shares = {
        name: use.busy_seconds / (record.seconds * use.replica_count) for name, use in record.use.items()
    }
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share > 0)


def _shown(seconds: float) -> str:
    return "–" if math.isnan(seconds) else f"{seconds:.2f}"


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
