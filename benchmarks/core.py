"""Core benchmark: one denoising step, one prompt and one image's decoding against diffusers, alternating in one run.

Both contenders have the same random weights, and their results are compared before timing. On a CPU the shape is a
quarter-size klein; `--device cuda --variant klein-4b` selects the real one.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable

import torch

from benchmarks.contenders import (
    decode_runs,
    oracle_encode_run,
    oracle_step_run,
    oracle_text_encoder,
    oracle_transformer,
    share_text_encoder,
    share_transformer,
)
from benchmarks.floor import products_alone
from benchmarks.measure import Bar, alternate, command, describe_machine, finish, paired_ratio
from benchmarks.random_modules import (
    Place,
    Run,
    StepInputs,
    cut_text_encoder,
    encode_run,
    flow_transformer,
    step_run,
)
from benchmarks.shapes import SHAPES, Shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEP_BAR, COMPILED_STEP_BAR, ENCODE_BAR, DECODE_BAR = 1.1, 1.25, 1.3, 0.95


def main() -> int:
    """Runs the selected measurements; returns the exit code."""
    options = _options()
    torch.manual_seed(0)
    if options.only_peak:
        print(_peak_alone(options, SHAPES[options.variant]))
        return 0
    print(f"{command()}\n{describe_machine('torch', 'diffusers', 'transformers')}")
    if options.device != "cpu":
        print(torch.cuda.get_device_name())
    bars = []
    for dtype in options.dtypes:
        for part in options.parts:
            bars += PARTS[part](options, dtype)
    if options.device == "cpu" and not options.no_memory:
        bars += [_memory_bar(options, part) for part in ("step", "encode") if part in options.parts]
    return finish(bars, options.check)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=sorted(SHAPES), default="quarter")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=sorted(DTYPES))
    parser.add_argument("--size", type=int, default=512, help="width and height of the image in pixels")
    parser.add_argument("--references", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--compile", action="store_true", help="measure our step with compiled blocks as well"
    )
    parser.add_argument(
        "--floor", action="store_true", help="also time diffusers' products and attention alone"
    )
    parser.add_argument(
        "--no-memory", action="store_true", help="leave out the peak memory of fresh processes"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is missed")
    parser.add_argument("--only-peak", choices=["ours", "diffusers"], help=argparse.SUPPRESS)
    return parser.parse_args()


def _step(options: argparse.Namespace, dtype: str) -> list[Bar]:
    shape, place = SHAPES[options.variant], Place(options.device, DTYPES[dtype])
    oracle = oracle_transformer(shape, place)
    ours = share_transformer(oracle, shape)
    bars = []
    for compiled in [False, True] if options.compile else [False]:
        if compiled:
            ours.compile_blocks()
        for count in options.references:
            inputs = StepInputs.draw(shape, place, options.size, count)
            runs = {"ours": step_run(ours, inputs), "diffusers": oracle_step_run(oracle, inputs)}
            name = f"{'compiled ' if compiled else ''}step, {dtype}, {options.size}², {count} references"
            bars.append(_speed_up_bar(name, runs, COMPILED_STEP_BAR if compiled else STEP_BAR, options))
            if options.floor and not compiled:
                _print_floor(runs["diffusers"], options)
    return bars


def _print_floor(run: Run, options: argparse.Namespace) -> None:
    """Prints the upper bound of a speed-up: the time of `run` over that of its products and attention alone."""
    with torch.no_grad():
        runs = {"whole": run, "floor": products_alone(run)}
        timed = {name: _synchronized(each, options.device) for name, each in runs.items()}
        seconds = alternate(timed, options.repeats)
    ratio = paired_ratio(seconds["whole"], seconds["floor"])
    print(f"  products and attention alone {min(seconds['floor']):.4f} s: at most {ratio:.2f}×", flush=True)


def _encode(options: argparse.Namespace, dtype: str) -> list[Bar]:
    shape, place = SHAPES[options.variant], Place(options.device, DTYPES[dtype])
    oracle = oracle_text_encoder(shape, place)
    ours = share_text_encoder(oracle, shape, place)
    runs = {"ours": encode_run(ours, shape, place), "diffusers": oracle_encode_run(oracle, shape, place)}
    return [_speed_up_bar(f"encode, {dtype}", runs, ENCODE_BAR, options)]


def _decode(options: argparse.Namespace, dtype: str) -> list[Bar]:
    runs = decode_runs(SHAPES[options.variant], Place(options.device, DTYPES[dtype]), options.size)
    return [_speed_up_bar(f"decode, {dtype}, {options.size}²", runs, DECODE_BAR, options)]


PARTS: dict[str, Callable[[argparse.Namespace, str], list[Bar]]] = {
    "step": _step,
    "encode": _encode,
    "decode": _decode,
}


def _speed_up_bar(name: str, runs: dict[str, Run], bar: float, options: argparse.Namespace) -> Bar:
    with torch.no_grad():
        _require_equal(name, runs)
        timed = {side: _synchronized(run, options.device) for side, run in runs.items()}
        seconds = alternate(timed, options.repeats)
    ratio = paired_ratio(seconds["diffusers"], seconds["ours"])
    best = {side: min(values) for side, values in seconds.items()}
    print(f"{name}: ours {best['ours']:.4f} s, diffusers {best['diffusers']:.4f} s, {ratio:.2f}×", flush=True)
    return Bar(f"{name}: times as fast", ratio, bar, at_most=False)


def _require_equal(name: str, runs: dict[str, Run]) -> None:
    """Raises SystemExit if the contenders' results differ."""
    ours, oracle = runs["ours"]().float(), runs["diffusers"]().float()
    error = float((ours - oracle).norm() / oracle.norm())
    if not error < 0.05:
        raise SystemExit(f"{name}: results differ by {error:.2g} of their norm; nothing was timed")


def _synchronized(run: Run, device: str) -> Run:
    if device == "cpu":
        return run

    def synchronized() -> torch.Tensor:
        result = run()
        torch.cuda.synchronize()
        return result

    return synchronized


def _memory_bar(options: argparse.Namespace, part: str) -> Bar:
    """Compares the peak resident memory of fresh processes with one contender each."""
    peaks = {side: _peak_of_fresh_process(options, part, side) for side in ("ours", "diffusers")}
    print(
        f"{part}, peak memory: ours {peaks['ours']:.0f} MB, diffusers {peaks['diffusers']:.0f} MB", flush=True
    )
    return Bar(f"{part}: peak memory against diffusers", peaks["ours"] / peaks["diffusers"], 1.0)


def _peak_of_fresh_process(options: argparse.Namespace, part: str, side: str) -> float:
    arguments = [
        "--variant",
        options.variant,
        "--parts",
        part,
        "--only-peak",
        side,
        "--size",
        str(options.size),
    ]
    command_line = [sys.executable, "-m", "benchmarks.core", *arguments]
    return float(subprocess.run(command_line, check=True, capture_output=True, text=True).stdout)


def _peak_alone(options: argparse.Namespace, shape: Shape) -> float:
    """Builds one contender, runs it once and returns this process's peak resident memory in MB."""
    place = Place("cpu", torch.float32)
    run: Run
    if options.parts == ["encode"]:
        ours = options.only_peak == "ours"
        encoder = cut_text_encoder(shape, place) if ours else oracle_text_encoder(shape, place)
        run = encode_run(encoder, shape, place) if ours else oracle_encode_run(encoder, shape, place)
    else:
        inputs = StepInputs.draw(shape, place, options.size, 0)
        if options.only_peak == "ours":
            run = step_run(flow_transformer(shape, place), inputs)
        else:
            run = oracle_step_run(oracle_transformer(shape, place), inputs)
    with torch.no_grad():
        run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
