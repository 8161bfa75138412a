"""Plot of `benchmarks.serve`: goodput and latency over the rate of arrivals, by contender."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.serve_record import Record


def plot(records: Sequence[Record], rates: Sequence[float], path: Path) -> None:
    """Draws the open-loop records; `rates` are theirs, in the same order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (goodput, interactive, every) = pyplot.subplots(1, 3, figsize=(15, 4.2))
    for contender in dict.fromkeys(record.contender for record in records):
        own = [(r, record) for r, record in zip(rates, records, strict=True) if record.contender == contender]
        x = [rate for rate, _ in own]
        goodput.plot(x, [record.goodput for _, record in own], "o-", label=contender)
        interactive.plot(x, [record.latency(0.95, "interactive") for _, record in own], "o-", label=contender)
        every.plot(x, [record.latency(0.95) for _, record in own], "o-", label=contender)
    goodput.plot(sorted(set(rates)), sorted(set(rates)), color="gray", linestyle=":", label="arrivals")
    goodput.set_ylabel("images a second, in time")
    interactive.set_ylabel("p95 of interactive requests, seconds")
    every.set_ylabel("p95 of all requests, seconds")
    for axis in (goodput, interactive, every):
        axis.set_xlabel("arrivals a second")
        axis.set_ylim(bottom=0)
    goodput.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
