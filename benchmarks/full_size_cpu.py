"""klein-4B in full size on a CPU: time and memory of four services for two images, next to diffusers.

    python -m benchmarks.full_size_cpu [--steps 4] [--size 256] [--skip-diffusers] [--folder FOLDER] [--check]

Weights are random (16 GB in bf16, written once to a folder that is removed at the end unless `--folder` names one), so
the images are noise; time and memory are those of real weights. The suite and diffusers run one after the other, each
alone on the machine, on the same weights and the same requests: a text-to-image and an edit of one reference.
`--shape quarter` is a small rehearsal.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from benchmarks.measure import Bar, command, describe_machine, finish
from benchmarks.shapes import SHAPES
from klein_client import AsyncClient
from klein_services.cli.process import SUITE
from klein_services.cli.suite import Suite, SuiteOptions

PROMPT = "a lighthouse on a cliff at dusk"
MEMORY_BAR_GIB = 24
SPARE_DISK_BYTES = 2 << 30
TIMEOUT_SECONDS = 7200
FLOWS = ("text-to-image", "edit")


def main() -> int:
    """Runs the selected measurements; returns the exit code."""
    options = _options()
    if options.diffusers:
        print(json.dumps(diffusers_side(options)))
        return 0
    print(f"$ {command()}\n{describe_machine('torch', 'diffusers', 'transformers')}", flush=True)
    with checkpoint(options) as folder:
        bar = suite_side(options, folder)
        if not options.skip_diffusers:
            show_diffusers(options, folder)
    return finish([bar], options.check)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="klein-4b")
    parser.add_argument("--size", type=int, default=256, help="width and height in pixels")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--folder", type=Path, help="folder of the checkpoint; written there and kept if missing"
    )
    parser.add_argument("--skip-diffusers", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the memory limit is missed")
    parser.add_argument("--diffusers", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


@contextmanager
def checkpoint(options: argparse.Namespace) -> Iterator[Path]:
    """Yields a folder with random weights, made if it is not there."""
    if options.folder is not None:
        _write(options.folder, options.shape)
        yield options.folder
        return
    with tempfile.TemporaryDirectory(prefix="klein-full-size-") as temporary:
        folder = Path(temporary) / options.shape
        _write(folder, options.shape)
        yield folder


def _write(folder: Path, shape: str) -> None:
    # torch is imported here alone, so that this process stays small beside what is measured.
    from benchmarks.random_checkpoint import checkpoint_bytes, write_checkpoint

    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed = checkpoint_bytes(SHAPES[shape]) + SPARE_DISK_BYTES
    if shutil.disk_usage(folder.parent).free < needed:
        raise SystemExit(f"{folder.parent} has too little room: {needed / 1e9:.0f} GB are needed")
    begin = time.perf_counter()
    unfinished = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    write_checkpoint(unfinished, SHAPES[shape])
    unfinished.rename(folder)
    print(f"{shape} written in {time.perf_counter() - begin:.0f} s", flush=True)


def suite_side(options: argparse.Namespace, folder: Path) -> Bar:
    """Starts the four services, makes both images, prints seconds; returns the peak memory of all four."""
    begin = time.perf_counter()
    settings = {"KLEIN_WARMUP_SIZES": "", "KLEIN_WARM_UP_SIZE_PX": "64"}
    with Suite(SuiteOptions(model=str(folder), device="cpu", threads=_threads(), settings=settings)) as suite:
        suite.wait_until_ready(timeout_seconds=TIMEOUT_SECONDS)
        print(f"suite: ready after {time.perf_counter() - begin:.1f} s", flush=True)
        asyncio.run(_make_both(suite.target, options))
        peaks = {name: _peak_bytes(suite.children[name].pid) for name in SUITE}
    for name, peak in peaks.items():
        print(f"  {name:<14} peak {peak / 1e9:6.2f} GB", flush=True)
    return Bar("peak memory of all four, GiB", sum(peaks.values()) / 2**30, MEMORY_BAR_GIB)


def _threads() -> int:
    """Settings that give all cores to each stage, because the stages work one after the other here."""
    return len(os.sched_getaffinity(0))


async def _make_both(target: str, options: argparse.Namespace) -> None:
    async with AsyncClient(target, timeout_seconds=TIMEOUT_SECONDS, retry=False) as client:
        for flow in FLOWS:
            references = [reference(options.size)] if flow == "edit" else []
            begin = time.perf_counter()
            made = await client.generate(
                f"{PROMPT}, {flow}",
                width=options.size,
                height=options.size,
                seed=0,
                steps=options.steps,
                references=references,
            )
            stages = ", ".join(f"{timing.operation} {timing.compute_seconds:.1f}" for timing in made.timings)
            print(f"suite: {flow} {time.perf_counter() - begin:.1f} s ({stages})", flush=True)


def reference(size: int) -> bytes:
    """Returns an image to edit."""
    file = io.BytesIO()
    gradient = Image.linear_gradient("L").resize((size, size))
    Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180))).save(file, "PNG")
    return file.getvalue()


def _peak_bytes(process_id: int) -> int:
    """Returns the peak memory of a process; its current memory on systems without a peak counter."""
    try:
        status = Path(f"/proc/{process_id}/status").read_text(encoding="ascii")
    except FileNotFoundError:
        return int(psutil.Process(process_id).memory_info().rss)
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def show_diffusers(options: argparse.Namespace, folder: Path) -> None:
    """Runs diffusers in a fresh process and prints its time and memory."""
    line = [sys.executable, "-m", "benchmarks.full_size_cpu", "--diffusers", str(folder)]
    line += [f"--size={options.size}", f"--steps={options.steps}"]
    answer = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
    measured = json.loads(answer.stdout.splitlines()[-1])
    print(f"diffusers: ready after {measured['ready']:.1f} s")
    for flow in FLOWS:
        print(f"diffusers: {flow} {measured[flow]:.1f} s")
    print(f"diffusers: peak {measured['peak'] / 1e9:.2f} GB in one process", flush=True)


def diffusers_side(options: argparse.Namespace) -> dict[str, float]:
    """Loads the checkpoint into diffusers and makes both images; returns seconds, and peak memory in bytes."""
    import torch
    from diffusers import Flux2KleinPipeline

    torch.set_num_threads(_threads())
    begin = time.perf_counter()
    load: Callable[..., Any] = Flux2KleinPipeline.from_pretrained
    pipeline = load(options.diffusers, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    measured = {"ready": time.perf_counter() - begin}
    picture = Image.open(io.BytesIO(reference(options.size)))
    for flow in FLOWS:
        measured[flow] = _seconds(
            lambda flow=flow: pipeline(  # type: ignore[misc]
                prompt=f"{PROMPT}, {flow}",
                image=[picture] if flow == "edit" else None,
                width=options.size,
                height=options.size,
                num_inference_steps=options.steps,
                generator=torch.Generator().manual_seed(0),
            )
        )
    return {**measured, "peak": _peak_bytes(os.getpid())}


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
