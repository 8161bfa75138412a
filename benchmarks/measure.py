"""Timing and reporting shared by the benchmarks: runs in turns, medians, ratios, the machine's description."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Bar:
    """A measured number and its limit."""

    name: str
    value: float
    limit: float
    at_most: bool = True
    """True: the value must not exceed the limit. False: it must reach the limit."""

    @property
    def holds(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def __str__(self) -> str:
        sign = "≤" if self.at_most else "≥"
        return f"{'ok  ' if self.holds else 'MISS'} {self.name}: {self.value:.3g} (bar {sign} {self.limit:g})"


def alternate(
    candidates: Mapping[str, Callable[[], object]], repeats: int, *, warmups: int = 1
) -> dict[str, list[float]]:
    """Runs the candidates in turns, so that noise affects all alike; returns seconds a run."""
    for _ in range(warmups):
        for candidate in candidates.values():
            candidate()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, candidate in candidates.items():
            begin = time.perf_counter()
            candidate()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def paired_ratio(baseline: Sequence[float], candidate: Sequence[float]) -> float:
    """Returns the median of the ratios of neighboring runs: how many times as fast the candidate is."""
    return statistics.median(b / c for b, c in zip(baseline, candidate, strict=True))


def describe_machine(*packages: str) -> str:
    """Returns one line: processor, cores, Python and the packages' versions."""
    versions = " ".join(f"{name} {metadata.version(name)}" for name in packages)
    return f"{_processor()}, Python {platform.python_version()}, {versions}"


def finish(bars: Sequence[Bar], check: bool) -> int:
    """Prints the bars; returns the exit status: 1 if `check` and a limit is missed."""
    for bar in bars:
        print(bar)
    return 1 if check and not all(bar.holds for bar in bars) else 0


def command() -> str:
    """Returns the command line that repeats this run."""
    module = Path(sys.argv[0]).stem
    return " ".join([f"python -m benchmarks.{module}", *sys.argv[1:]])


def _processor() -> str:
    cores = len(os.sched_getaffinity(0))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.processor() or platform.machine()}, {cores} cores"
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    features = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return f"{name}, {cores} cores ({' '.join(features)})"
