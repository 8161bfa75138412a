"""Plot of the closed loop's runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.autoscaling_record import WINDOW_SECONDS, Record

TITLES = {"prometheus": "Prometheus", "external": "external scaler", "blind": "Prometheus stopped"}


def plot(records: Sequence[Record], path: Path, speed: float) -> None:
    """Draws rates, replicas, backlog and latencies of all runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        3, len(records), figsize=(5.2 * len(records), 7.5), sharex="col", sharey="row", squeeze=False
    )
    for column, record in enumerate(records):
        replicas, backlog, latency = (row[column] for row in axes)
        replicas.set_title(TITLES[record.mode])
        replicas.step(*zip(*record.desired, strict=True), where="post", label="desired replicas")
        serving = [*record.serving, (record.load.seconds, record.serving[-1][1])]
        replicas.step(*zip(*serving, strict=True), where="post", label="serving replicas")
        times = [
            0,
            record.load.before_seconds,
            record.load.before_seconds + record.load.peak_seconds,
            record.load.seconds,
        ]
        rates = [record.load.base, record.load.peak, record.load.base, record.load.base]
        replicas.step(times, rates, where="post", color="gray", linestyle=":", label="requests a second")
        backlog.plot(*zip(*record.values, strict=True), color="tab:green")
        latency.plot(*zip(*sorted(record.answers), strict=True), ".", markersize=3, label="each request")
        starts = [WINDOW_SECONDS * number for number in range(int(record.load.seconds / WINDOW_SECONDS))]
        points = [(at + WINDOW_SECONDS / 2, record.p95(at, at + WINDOW_SECONDS)) for at in starts]
        latency.plot(*zip(*points, strict=True), color="tab:red", label=f"p95 of {WINDOW_SECONDS:.0f} s")
        if record.blind:
            for axis in (replicas, backlog, latency):
                axis.axvspan(*record.blind, color="black", alpha=0.08)
        latency.set_xlabel(f"seconds; periods of the manifests divided by {speed:g}")
    for row, text in zip(axes, ("replicas", "backlog, device seconds", "latency, seconds"), strict=True):
        row[0].set_ylabel(text)
    axes[0][0].legend(loc="upper right", fontsize=8)
    axes[2][0].legend(loc="upper right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
