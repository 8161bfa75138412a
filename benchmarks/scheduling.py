"""The denoiser's scheduler against two FIFO policies, on a simulated device and clock.

    python -m benchmarks.scheduling [--check] [--requests 600] [--json FILE] [--plot FILE] [--trace FILE ...]
    python -m benchmarks.scheduling --write-bursts benchmarks/traces/bursts.json

`exclusive` serves one request after the other; `batch` takes along waiting requests of the same size and steps as far
as they fit into a step. All get the same requests. Each runs twice: without deadlines, for latencies, throughput and
the accuracy of estimates; and with clients that give up at their deadlines, for the share that is served in time.
Deadlines are in `benchmarks/scheduling_traces.py`, the device is in `benchmarks/scheduling_device.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.measure import Bar, command, finish
from benchmarks.scheduling_policies import Outcome, fifo, suite
from benchmarks.scheduling_traces import BURSTS, Arrival, bursts, poisson, read, write
from klein_services.runtime.urgency import Urgency

POLICIES: dict[str, Callable[[Sequence[Arrival], bool], list[Outcome]]] = {
    "suite": lambda arrivals, has_deadlines: suite(arrivals, has_deadlines=has_deadlines),
    "exclusive": lambda arrivals, has_deadlines: fifo(arrivals, has_deadlines=has_deadlines, packs=False),
    "batch": lambda arrivals, has_deadlines: fifo(arrivals, has_deadlines=has_deadlines, packs=True),
}
BUSY, OVERLOADED = 0.9, 1.5
"""Offered work over what a device does that serves one request after the other."""
BURST_UTILIZATION = 0.95
BURST_REQUESTS = 600
LATENCY_BAR, HITS_BAR, THROUGHPUT_BAR, ESTIMATE_BAR = 0.4, 1.3, 0.99, 0.15
"""Throughput must not be lower; the noise of the last request's steps alone moves it by a few thousandths."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One policy on one trace."""

    trace: str
    policy: str
    interactive_p50_seconds: float
    interactive_p95_seconds: float
    mean_seconds: float
    requests_per_second: float
    """Requests over the time from the first arrival to the last result."""
    hit_share: float
    estimate_error: float | None
    """Median of the relative error of the latency estimated when a request came."""
    interactive_seconds: tuple[float, ...]
    """All latencies of the class, sorted."""


def measure(trace: str, arrivals: Sequence[Arrival], policy: str) -> Result:
    """Runs a policy with and without deadlines."""
    outcomes, hurried = POLICIES[policy](arrivals, False), POLICIES[policy](arrivals, True)
    latencies = [each.latency_seconds for each in outcomes if each.latency_seconds is not None]
    if not len(latencies) == len(outcomes) == len(hurried) == len(arrivals):
        raise AssertionError(f"{policy} lost requests of {trace}")
    interactive = sorted(
        each.latency_seconds
        for each in outcomes
        if each.latency_seconds is not None and each.arrival.urgency is Urgency.INTERACTIVE
    )
    errors = [
        abs(each.estimated_seconds / each.latency_seconds - 1)
        for each in outcomes
        if each.estimated_seconds is not None and each.latency_seconds is not None
    ]
    last = max(each.ended_seconds for each in outcomes if each.ended_seconds is not None)
    return Result(
        trace=trace,
        policy=policy,
        interactive_p50_seconds=statistics.median(interactive),
        interactive_p95_seconds=interactive[int(0.95 * (len(interactive) - 1))],
        mean_seconds=statistics.mean(latencies),
        requests_per_second=len(arrivals) / (last - arrivals[0].at_seconds),
        hit_share=sum(each.is_hit for each in hurried) / len(hurried),
        estimate_error=statistics.median(errors) if errors else None,
        interactive_seconds=tuple(interactive),
    )


def compare(trace: str, arrivals: Sequence[Arrival]) -> dict[str, Result]:
    """Runs all policies on a trace."""
    return {policy: measure(trace, arrivals, policy) for policy in POLICIES}


def bars(results: dict[str, Result], *, is_estimate_bound: bool) -> list[Bar]:
    """Returns the limits of one trace. Hits are not bound where 1.3 times as many would be more than all."""
    ours, exclusive = results["suite"], results["exclusive"]
    latency = ours.interactive_p95_seconds / exclusive.interactive_p95_seconds
    throughput = ours.requests_per_second / exclusive.requests_per_second
    limits = [
        Bar(f"{ours.trace}: interactive p95 / exclusive's", latency, LATENCY_BAR),
        Bar(f"{ours.trace}: throughput / exclusive's", throughput, THROUGHPUT_BAR, at_most=False),
    ]
    if exclusive.hit_share * HITS_BAR <= 1:
        hits = ours.hit_share / exclusive.hit_share
        limits.append(Bar(f"{ours.trace}: deadline hits / exclusive's", hits, HITS_BAR, at_most=False))
    if is_estimate_bound and ours.estimate_error is not None:
        limits.append(Bar(f"{ours.trace}: estimate, median error", ours.estimate_error, ESTIMATE_BAR))
    return limits


def table(results: Sequence[Result]) -> str:
    """Returns a Markdown table."""
    lines = [
        "| trace | policy | interactive p50 / p95 | mean of all | requests/s | deadlines met | estimate off by |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in results:
        error = "" if each.estimate_error is None else f"{each.estimate_error:.0%}"
        lines.append(
            f"| {each.trace} | {each.policy} "
            f"| {each.interactive_p50_seconds:.2f} / {each.interactive_p95_seconds:.2f} s "
            f"| {each.mean_seconds:.1f} s | {each.requests_per_second:.3f} | {each.hit_share:.1%} | {error} |"
        )
    return "\n".join(lines)


def plot(traces: Sequence[dict[str, Result]], path: Path) -> None:
    """Draws the share of interactive requests that ended within a time, and the deadlines met."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(traces), figsize=(4.6 * len(traces), 6.5), squeeze=False)
    for column, results in enumerate(traces):
        latency, hits = (row[column] for row in axes)
        for name, each in results.items():
            count = len(each.interactive_seconds)
            shares = [(number + 1) / count for number in range(count)]
            latency.step(each.interactive_seconds, shares, where="post", label=name)
        latency.set_xscale("log")
        latency.set_title(results["suite"].trace)
        latency.set_xlabel("latency of interactive requests, seconds")
        hits.bar(list(results), [each.hit_share for each in results.values()], color="tab:green")
        hits.set_ylim(0, 1)
    axes[0][0].set_ylabel("share of requests")
    axes[1][0].set_ylabel("deadlines met")
    axes[0][0].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is missed")
    parser.add_argument("--requests", type=int, default=600, help="requests of a Poisson trace")
    parser.add_argument("--seed", type=int, default=0, help="of the Poisson traces")
    parser.add_argument("--trace", type=Path, action="append", help="arrivals in JSON instead of bursts.json")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--plot", type=Path, help="picture of the results")
    parser.add_argument("--write-bursts", type=Path, metavar="FILE", help="write the trace of bursts and end")
    options = parser.parse_args()
    if options.write_bursts:
        write(bursts(BURST_REQUESTS, BURST_UTILIZATION, options.seed), options.write_bursts)
        return 0
    print(command())
    traces = {
        f"Poisson {utilization}": poisson(options.requests, utilization, options.seed)
        for utilization in (BUSY, OVERLOADED)
    }
    traces |= {path.stem: read(path) for path in options.trace or [BURSTS]}
    compared = [compare(name, arrivals) for name, arrivals in traces.items()]
    print(table([result for results in compared for result in results.values()]))
    if options.json:
        rows = [asdict(result) for results in compared for result in results.values()]
        options.json.write_text(
            json.dumps({"command": command(), "results": rows}, indent=1) + "\n", encoding="utf-8"
        )
    if options.plot:
        plot(compared, options.plot)
    limits = [
        bar
        for name, results in zip(traces, compared, strict=True)
        for bar in bars(results, is_estimate_bound=name == f"Poisson {BUSY}")
    ]
    return finish(limits, options.check)


if __name__ == "__main__":
    sys.exit(main())
