"""The suite and diffusers on one random checkpoint: time of an image, and images per second under load."""

from __future__ import annotations

import asyncio
import io
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from benchmarks.gpu.record import Record, Target
from benchmarks.shapes import SHAPES

PROMPT = "a lighthouse on a cliff at dusk"
STEP_COUNT = 4
CLIENTS = 8
READY_SECONDS = 150.0


def checkpoint(record: Record, target: Target) -> None:
    """Writes random weights of all stages in diffusers' layout."""

    def write() -> dict[str, Any]:
        from benchmarks.random_checkpoint import write_checkpoint

        begin = time.perf_counter()
        folder = target.folder / "checkpoint"
        folder.mkdir(parents=True)
        write_checkpoint(folder, SHAPES[target.variant], device=target.device)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return {"seconds": round(time.perf_counter() - begin, 1), "gib": round(size / 2**30, 2)}

    record.attempt("checkpoint", write)


def suite(record: Record, target: Target) -> None:
    """Records images through four processes: alone in each format, edits, and eight clients; compiled and not."""
    from klein_services.cli.suite import Suite, SuiteOptions

    for compiles in ("off", "on") if target.on_gpu else ("off",):
        settings = {"KLEIN_COMPILE": compiles}
        options = SuiteOptions(
            model=str(target.folder / "checkpoint"), device=str(target.device), settings=settings
        )
        begin = time.perf_counter()

        def run(
            options: SuiteOptions = options, begin: float = begin, compiles: str = compiles
        ) -> dict[str, Any]:
            with Suite(options) as started:
                started.wait_until_ready(timeout_seconds=READY_SECONDS)
                ready = time.perf_counter() - begin
                asyncio.run(_requests(record, target, started.target, f"compile {compiles}"))
            return {"ready_seconds": round(ready, 1)}

        record.attempt(f"compile {compiles}: suite", run)


async def _requests(record: Record, target: Target, address: str, label: str) -> None:
    from klein_client import AsyncClient

    main, small = target.scale.sides_px[-2], target.scale.sides_px[0]
    seeds = itertools.count()
    async with AsyncClient(address) as client:

        async def one(side_px: int, **options: Any) -> Any:
            return await client.generate(
                PROMPT, width=side_px, height=side_px, steps=STEP_COUNT, seed=next(seeds), **options
            )

        async def alone(case: str, count: int, side_px: int, **options: Any) -> None:
            if record.is_late:
                record.add(case, skipped="the part's time is over")
                return
            taken, generation = [], None
            for _ in range(count + 1):
                begin = time.perf_counter()
                generation = await one(side_px, **options)
                taken.append((time.perf_counter() - begin) * 1e3)
            timings = (
                {each.operation: round(each.compute_seconds * 1e3, 2) for each in generation.summary.timings}
                if generation
                else {}
            )
            record.add(
                case,
                ms=round(statistics.median(taken[1:]), 2),
                least_ms=round(min(taken[1:]), 2),
                first_ms=round(taken[0], 2),
                compute_ms=timings,
            )

        async def together(case: str, sides_px: Sequence[int]) -> None:
            if record.is_late:
                record.add(case, skipped="the part's time is over")
                return
            ends_at, done = time.monotonic() + target.scale.client_seconds, [0]
            turn = itertools.cycle(sides_px)

            async def ask() -> None:
                while time.monotonic() < ends_at:
                    await one(next(turn), format="jpeg")
                    done[0] += 1

            begin = time.perf_counter()
            await asyncio.gather(*(ask() for _ in range(CLIENTS)))
            seconds = time.perf_counter() - begin
            record.add(
                case, images=done[0], seconds=round(seconds, 2), images_per_second=round(done[0] / seconds, 2)
            )

        count = 20 if target.on_gpu else 2
        await alone(f"{label}: {main}² JPEG", count, main, format="jpeg")
        await alone(f"{label}: {main}² PNG", count, main, format="png")
        await alone(f"{label}: {main}² raw", count // 2, main, format="raw")
        picture = reference(main)
        await alone(
            f"{label}: edit of one {main}² JPEG", count // 2, main, format="jpeg", references=[picture]
        )
        await together(f"{label}: {CLIENTS} clients, {small}²", [small])
        quarter = max(64, small // 2)
        await together(f"{label}: {CLIENTS} clients, mixed", [small, quarter, main, small])
        await together(f"{label}: {CLIENTS} clients, {quarter}²", [quarter])


def reference(side_px: int) -> bytes:
    """Returns an image to edit, as a JPEG file."""
    file = io.BytesIO()
    gradient = Image.linear_gradient("L").resize((side_px, side_px))
    Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180))).save(file, "JPEG")
    return file.getvalue()


def diffusers(record: Record, target: Target) -> None:
    """Records diffusers' pipeline on the same weights, uncompiled and with a compiled transformer."""
    from diffusers import Flux2KleinPipeline

    load: Callable[..., Any] = Flux2KleinPipeline.from_pretrained
    pipeline = load(target.folder / "checkpoint", torch_dtype=target.dtype).to(target.device)
    pipeline.set_progress_bar_config(disable=True)
    main, small = target.scale.sides_px[-2], target.scale.sides_px[0]
    picture = Image.open(io.BytesIO(reference(main)))
    for mode in ("eager", "compiled") if target.on_gpu else ("eager",):
        if mode == "compiled":
            pipeline.transformer.compile()
        for side_px, images in ((main, None), (small, None), (main, [picture])):
            flow = "edit of one " if images else ""

            def run(side_px: int = side_px, images: Any = images) -> None:
                pipeline(
                    prompt=PROMPT, image=images, width=side_px, height=side_px, num_inference_steps=STEP_COUNT
                )

            record.time(f"{mode}: {flow}{side_px}²", target, run)


def tests(record: Record, target: Target) -> None:
    """Records the outcome of the tests that need a GPU; without one they are skipped."""

    def run() -> dict[str, Any]:
        command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"]
        answer = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
        lines = answer.stdout.splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
        return {
            "exit_code": answer.returncode,
            "summary": lines[-1:] or answer.stderr[-300:],
            "failed": failed[:30],
        }

    record.attempt("tests/gpu", run)
