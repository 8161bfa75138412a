"""Delay of a small edit by callers with large pictures, over real processes, and the memory of the vae-decoder.

    python -m benchmarks.neighbors [--check] [--seconds 40] [--attack files|batch]

`files`: three clients send edits with four PNG files of 8192² each, one after the other. `batch`: two clients send
edits of the batch class with four references of 1024². Meanwhile one client edits a picture of 64 px, interactively. It
may wait for three times its time alone and for the longest operation that a device did.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import statistics
import sys
import time
from io import BytesIO
from pathlib import Path

from PIL import Image

from benchmarks.measure import Bar, describe_machine, finish
from klein_client import AsyncClient, ImageOptions, KleinError
from klein_services.cli.suite import Suite, SuiteOptions
from klein_services.runtime.scrape import scrape

PROMPT = "a red heart"
ALLOWED_MIB = 600
_COLORS = itertools.count(1)


def picture(side_px: int) -> bytes:
    """Returns a PNG file of one color that no stage has seen."""
    file = BytesIO()
    color = next(_COLORS)
    Image.new("RGB", (side_px, side_px), (color % 256, color // 256 % 256, 7)).save(file, "PNG")
    return file.getvalue()


def edit(references: list[bytes], priority: str) -> ImageOptions:
    return ImageOptions(references=references, width=64, height=64, priority=priority, timeout_seconds=300)


async def timed_edit(target: str) -> float:
    async with AsyncClient(target, retry=False) as client:
        begin = time.perf_counter()
        await client.generate(PROMPT, **edit([picture(64)], "interactive"))
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


def longest_operation_seconds(suite: Suite) -> float:
    """Returns the bound of the histogram bucket that holds the longest device operation or step so far.

    Beyond the last bucket its lower bound counts, so that the limit is never infinite.
    """
    longest = 0.0
    for port in suite.metrics_ports.values():
        page = scrape(f"127.0.0.1:{port}")
        for name in ("klein_stage_duration_seconds", "klein_denoise_step_seconds"):
            if name == "klein_stage_duration_seconds" and page.series("klein_denoise_step_seconds_count"):
                continue  # the denoiser's requests are many operations, its steps are one
            counts: dict[tuple[str, str], list[tuple[float, float]]] = {}
            for labels, value in page.series(f"{name}_bucket"):
                key = (labels["stage"], labels.get("operation", ""))
                counts.setdefault(key, []).append((float(labels["le"]), value))
            for buckets in counts.values():
                total = max(value for _, value in buckets)
                if total:
                    reached = min(bound for bound, value in buckets if value == total)
                    finite = max(bound for bound, _ in buckets if bound != math.inf)
                    longest = max(longest, min(reached, finite))
    return longest


async def measure(suite: Suite, kind: str, seconds: float) -> list[Bar]:
    target, vae_decoder = suite.target, suite.children["vae-decoder"].pid
    alone = [await timed_edit(target) for _ in range(15)][5:]
    idle_mib = peak_mib = resident_mib(vae_decoder)

    async def watch() -> None:
        nonlocal peak_mib
        while True:
            peak_mib = max(peak_mib, resident_mib(vae_decoder))
            await asyncio.sleep(0.01)

    outcomes: list[str] = []
    file = picture(8192 if kind == "files" else 1024)
    tasks = [
        asyncio.create_task(attack(target, kind, file, outcomes)) for _ in range(3 if kind == "files" else 2)
    ]
    tasks.append(asyncio.create_task(watch()))
    await asyncio.sleep(3)
    ends_at, delayed = time.monotonic() + seconds, []
    while time.monotonic() < ends_at:
        delayed.append(await timed_edit(target))
        await asyncio.sleep(0.1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    operation = longest_operation_seconds(suite)
    p95 = sorted(delayed)[int(0.95 * (len(delayed) - 1))]
    median_alone = statistics.median(alone)
    print(
        f"{kind}: alone {median_alone:.3f} s; next to them median {statistics.median(delayed):.3f} s, p95 {p95:.3f} s, "
        f"longest {max(delayed):.3f} s of {len(delayed)}; longest operation about {operation:g} s; "
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
