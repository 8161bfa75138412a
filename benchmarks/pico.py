"""Benchmark of the suite with pico on this machine: start-up, time of an image, memory. `python -m benchmarks.pico`.

`--check` exits with 1 if a limit is missed: ready in 10 s, a 128 × 128 image in 0.4 s, 700 MB a stage.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from klein_client import AsyncClient, Generation
from klein_services.cli.errors import CliError
from klein_services.cli.model_store import PICO
from klein_services.cli.process import STAGES
from klein_services.cli.suite import Suite, SuiteOptions

READY_SECONDS = 10.0
PICTURE_SECONDS = 0.4
STAGE_MEGABYTES = 700.0
WARM_UP_COUNT = 3
SIDE_PX = 128


@dataclass(frozen=True)
class Measurement:
    """A measured number and its upper limit."""

    name: str
    value: float
    bar: float
    unit: str

    @property
    def is_met(self) -> bool:
        return self.value <= self.bar

    def __str__(self) -> str:
        verdict = "met" if self.is_met else "MISSED"
        return f"{self.name:<36} {self.value:8.3f} {self.unit:<3} bar {self.bar:g} {self.unit}: {verdict}"


def measure(model: str, run_count: int, threads: int) -> list[Measurement]:
    """Starts the suite, measures, stops it."""
    started = time.perf_counter()
    with Suite(SuiteOptions(model=model, threads=threads)) as suite:
        suite.wait_until_ready()
        ready = Measurement("ready after", time.perf_counter() - started, READY_SECONDS, "s")
        loading_cpu = _cpu_seconds(suite)
        memory = [_resident(stage, suite.children[stage].pid) for stage in STAGES]
        seconds, last = asyncio.run(_time_pictures(suite.target, run_count))
        picture_cpu = (sum(_cpu_seconds(suite).values()) - sum(loading_cpu.values())) / (
            WARM_UP_COUNT + run_count
        )
    _show_stages(last)
    # What a busy machine does not change, unlike the times below.
    print("CPU seconds until ready: " + ", ".join(f"{name} {used:.1f}" for name, used in loading_cpu.items()))
    print(f"CPU seconds a picture, all four together: {picture_cpu:.3f}")
    name = f"picture, median of {run_count}"
    return [ready, Measurement(name, statistics.median(seconds), PICTURE_SECONDS, "s"), *memory]


def _cpu_seconds(suite: Suite) -> dict[str, float]:
    times = {name: psutil.Process(child.pid).cpu_times() for name, child in suite.children.items()}
    return {name: used.user + used.system for name, used in times.items()}


async def _time_pictures(target: str, run_count: int) -> tuple[list[float], Generation]:
    seconds: list[float] = []
    async with AsyncClient(target, timeout_seconds=60, retry=False) as client:
        for run in range(WARM_UP_COUNT + run_count):
            # Another prompt each time: the same one would be answered from the orchestrator's cache.
            prompt = f"a large red heart on a yellow background {run}"
            started = time.perf_counter()
            last = await client.generate(prompt, seed=run, width=SIDE_PX, height=SIDE_PX)
            seconds.append(time.perf_counter() - started)
    return seconds[WARM_UP_COUNT:], last


def _resident(stage: str, pid: int) -> Measurement:
    resident = psutil.Process(pid).memory_info().rss
    return Measurement(f"{stage}, idle resident memory", resident / 1e6, STAGE_MEGABYTES, "MB")


def _show_stages(generation: Generation) -> None:
    for timing in generation.timings:
        call, compute = timing.call_seconds * 1e3, timing.compute_seconds * 1e3
        print(f"last picture, {timing.operation:<22} {call:8.1f} ms called, {compute:.1f} ms computed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is missed")
    parser.add_argument("--runs", type=int, default=20, help="images to time")
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads of each stage; 0 is the suite's choice"
    )
    parser.add_argument("--model", default=PICO, help="pico, or a checkpoint's folder")
    options = parser.parse_args(arguments)
    print(f"{psutil.cpu_count()} CPU cores, Python {sys.version.split()[0]}, {Path(options.model).name}")
    try:
        measurements = measure(options.model, options.runs, options.threads)
    except CliError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(*measurements, sep="\n")
    return int(options.check and not all(each.is_met for each in measurements))


if __name__ == "__main__":
    sys.exit(main())
