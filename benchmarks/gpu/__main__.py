"""One run on a GPU that measures everything: `python -m benchmarks.gpu [--output FOLDER] [--budget 570]`.

Each part runs in a process of its own, which is killed at its deadline; its cases are in the output's `cases.jsonl` as
soon as they are measured. At the end a table is printed and written. Weights are random, in klein-4B's shapes.
`--device cpu --variant tiny` rehearses every part in less than a minute.

Without a network: `python -m benchmarks.gpu.needs FOLDER` fetches what else is needed, and `--site FOLDER` uses it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu.report import write_report

# Part → module and function, seconds on a GPU: the most wanted first, each with its share of ten minutes.
PARTS: Mapping[str, tuple[str, float]] = {
    "versions": ("kernels.versions", 20),
    "tests": ("service.tests", 70),
    "steps": ("networks.steps", 130),
    "checkpoint": ("service.checkpoint", 40),
    "suite": ("service.suite", 150),
    "diffusers": ("service.diffusers", 60),
    "images": ("networks.images", 50),
    "prompts": ("networks.prompts", 35),
    "attention": ("kernels.attention", 35),
    "products": ("kernels.products", 25),
    "profile": ("networks.profile", 40),
    "interference": ("networks.interference", 40),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts, or one of them in this process; returns the exit code."""
    options = _options(arguments)
    if options.part:
        for part in options.part:
            _run_part(part, options)
        return 0
    output = options.output
    output.mkdir(parents=True, exist_ok=True)
    cases = output / "cases.jsonl"
    cases.unlink(missing_ok=True)
    cases.touch()
    ends_at = time.monotonic() + options.budget
    with tempfile.TemporaryDirectory(prefix="klein-gpu-", dir=_scratch()) as scratch:
        # A rehearsal has one process for all: importing torch anew takes longer than most parts.
        for parts in [[part] for part in options.parts] if options.device != "cpu" else [options.parts]:
            seconds = min(sum(PARTS[part][1] for part in parts), ends_at - time.monotonic())
            if seconds > 1:
                _start(parts, seconds, scratch, options)
    print(write_report(cases, output, " ".join(["python -m benchmarks.gpu", *sys.argv[1:]])))
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--variant", default="klein-4b", help="a shape of benchmarks/shapes.py")
    parser.add_argument("--output", type=Path, default=Path("gpu-run"), help="folder of the results")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for all parts")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--site", type=Path, help="folder of packages that are not installed")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _scratch() -> str | None:
    """Returns a folder in memory for the checkpoint if there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _start(parts: Sequence[str], seconds: float, scratch: str, options: argparse.Namespace) -> None:
    """Runs parts in a process of their own; kills it, and what it started, at its deadline."""
    line = [sys.executable, "-m", "benchmarks.gpu", "--part", *parts, "--scratch", scratch]
    line += ["--device", options.device, "--variant", options.variant, "--output", str(options.output)]
    # The part stops by itself before it is killed.
    line += ["--deadline", str(0.85 * seconds)]
    environment = dict(os.environ)
    roots = [".", "protos", "services", *([str(options.site)] if options.site else [])]
    environment["PYTHONPATH"] = os.pathsep.join([*roots, *filter(None, [environment.get("PYTHONPATH")])])
    begin = time.monotonic()
    process = subprocess.Popen(line, env=environment, start_new_session=True)
    try:
        code: int | str = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        # The suite's processes end with their parent.
        process.kill()
        process.wait()
        code = "killed at its deadline"
    print(f"{' '.join(parts)}: {time.monotonic() - begin:.0f} s of {seconds:.0f}, exit {code}", flush=True)


def _run_part(part: str, options: argparse.Namespace) -> None:
    import torch

    from benchmarks.gpu.record import Record, Target

    torch.manual_seed(0)
    if options.device == "cpu":
        torch.set_num_threads(1)
    module, function = PARTS[part][0].split(".")
    record = Record(part, options.output / "cases.jsonl", time.monotonic() + options.deadline)
    target = Target(torch.device(options.device), options.variant, Path(options.scratch))
    measure = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
    with torch.inference_mode():
        record.attempt(part, lambda: measure(record, target) or {})


if __name__ == "__main__":
    sys.exit(main())
