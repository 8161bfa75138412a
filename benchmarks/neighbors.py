"""Delay of a small edit by callers with large pictures, over real processes, and the memory of the vae-decoder.

    python -m benchmarks.neighbors [--check] [--seconds 40] [--attack files|batch]

`files`: three clients send edits with four PNG files of 8192² each, one after the other. `batch`: two clients send
edits of the batch class with four references of 1024². Meanwhile one client edits a picture of 64 px, interactively.
The p95 of its edits may be three times their time alone and the longest single operation of a device's thread: an
encoding, a decoding or a denoising step. Large files are read on a thread of their own, so they do not count.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import statistics
import sys
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

from PIL import Image

from benchmarks.measure import Bar, describe_machine, finish
from klein_client import AsyncClient, ImageOptions, KleinError
from klein_services.cli.suite import Suite, SuiteOptions
from klein_services.runtime.scrape import scrape

PROMPT = "a red heart"
ALLOWED_MIB = 600
FILE_THREADS = "vae-decoder-files"
_COLORS = itertools.count(1)


def picture(side_px: int) -> bytes:
    """Returns a PNG file of one color that no stage has seen."""
    file = BytesIO()
    color = next(_COLORS)
    Image.new("RGB", (side_px, side_px), (color % 256, color // 256 % 256, 7)).save(file, "PNG")
    return file.getvalue()


def edit(references: list[bytes], priority: str, timeout_seconds: float = 300) -> ImageOptions:
    return ImageOptions(
        references=references, width=64, height=64, priority=priority, timeout_seconds=timeout_seconds
    )


async def timed_edit(target: str) -> float:
    async with AsyncClient(target, retry=False) as client:
        begin = time.perf_counter()
        await client.generate(PROMPT, **edit([picture(64)], "interactive", 1800))
        return time.perf_counter() - begin


async def attack(target: str, kind: str, file: bytes, outcomes: list[str]) -> None:
    """Sends one edit after the other until it is cancelled."""
    priority = "standard" if kind == "files" else "batch"
    async with AsyncClient(target, retry=False) as client:
        while True:
            # Decoders ignore what follows the image, and no cache has seen the file.
            references = [file + next(_COLORS).to_bytes(8) for _ in range(4)]
            try:
                await client.generate(PROMPT, **edit(references, priority))
                outcomes.append("OK")
            except KleinError as error:
                outcomes.append(error.code.name)


def resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1024


class Operations:
    """The longest operation of each thread that computes, from the sums and counts of the processes' metrics.

    A sum that grew by one operation between two scrapes shows that operation's time exactly. When several end between
    two scrapes, all but the first lie within the interval, so the first took at least what the sum grew beyond it.
    """

    def __init__(self, suite: Suite) -> None:
        self._ports = suite.metrics_ports
        self._seen: dict[tuple[str, str], tuple[float, float]] = {}
        self._updated_at = 0.0
        self.longest: dict[str, float] = {}
        """Seconds by thread."""
        self.update()
        self.longest.clear()

    def update(self) -> None:
        """Reads what has ended since the last update."""
        before_at, self._updated_at = self._updated_at, time.monotonic()
        for process in ("text-encoder", "denoiser", "vae-decoder"):
            page = scrape(f"127.0.0.1:{self._ports[process]}")
            # The denoiser's requests are many operations; its steps are one each.
            name = "klein_denoise_step_seconds" if process == "denoiser" else "klein_stage_duration_seconds"
            counts = {_key(labels): value for labels, value in page.series(f"{name}_count")}
            for labels, total in page.series(f"{name}_sum"):
                key = _key(labels)
                count, before = self._seen.get(key, (0.0, 0.0))
                self._seen[key] = counts[key], total
                seconds = total - before
                if counts[key] > count + 1:
                    seconds -= time.monotonic() - before_at
                self.longest[key[0]] = max(self.longest.get(key[0], 0.0), seconds)


def _key(labels: Mapping[str, str]) -> tuple[str, str]:
    return labels["stage"], labels.get("operation", "")


async def measure(suite: Suite, kind: str, seconds: float) -> list[Bar]:
    target, vae_decoder = suite.target, suite.children["vae-decoder"].pid
    alone = [await timed_edit(target) for _ in range(15)][5:]
    idle_mib = peak_mib = resident_mib(vae_decoder)
    operations = Operations(suite)

    async def watch() -> None:
        nonlocal peak_mib
        while True:
            peak_mib = max(peak_mib, resident_mib(vae_decoder))
            await asyncio.sleep(0.01)

    async def watch_operations() -> None:
        while True:
            await asyncio.to_thread(operations.update)
            await asyncio.sleep(0.2)

    outcomes: list[str] = []
    file = picture(8192 if kind == "files" else 1024)
    tasks = [
        asyncio.create_task(attack(target, kind, file, outcomes)) for _ in range(3 if kind == "files" else 2)
    ]
    tasks += [asyncio.create_task(watch()), asyncio.create_task(watch_operations())]
    await asyncio.sleep(3)
    ends_at, delayed = time.monotonic() + seconds, []
    while time.monotonic() < ends_at:
        delayed.append(await timed_edit(target))
        await asyncio.sleep(0.1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    operations.update()
    longest = {thread: round(seconds, 3) for thread, seconds in sorted(operations.longest.items())}
    operation = max(seconds for thread, seconds in longest.items() if thread != FILE_THREADS)
    p95 = sorted(delayed)[math.ceil(0.95 * len(delayed)) - 1]
    median_alone = statistics.median(alone)
    print(
        f"{kind}: alone {median_alone:.3f} s; next to them median {statistics.median(delayed):.3f} s, p95 {p95:.3f} s, "
        f"longest {max(delayed):.3f} s of {len(delayed)}; longest operation of each thread, s: {longest}; "
        f"attackers: { {name: outcomes.count(name) for name in sorted(set(outcomes))} }"
    )
    return [
        Bar(f"{kind}: p95 next to them, s", p95, 3 * median_alone + operation),
        Bar(f"{kind}: vae-decoder above idle, MiB", peak_mib - idle_mib, ALLOWED_MIB),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--attack", choices=("files", "batch"), action="append")
    arguments = parser.parse_args()
    print(describe_machine("torch", "grpcio", "pillow"))
    bars: list[Bar] = []
    for kind in arguments.attack or ("files", "batch"):
        with Suite(SuiteOptions(model="pico", device="cpu", threads=1)) as suite:
            suite.wait_until_ready(timeout_seconds=300)
            bars += asyncio.run(measure(suite, kind, arguments.seconds))
    return finish(bars, arguments.check)


if __name__ == "__main__":
    sys.exit(main())
