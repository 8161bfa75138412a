"""Overhead of the suite over the model in one process: the public API over loopback, one request at a time.

    python -m benchmarks.overhead [--check] [--rounds 30] [--model FOLDER] [--only stub|model]

Two measurements. `stub`: three stages that only send, check and hash tensors of klein-4B's sizes at 1024 × 1024
(a prompt embedding of 512 × 7680 bf16, latents of 1 MiB, an image of 1.5 MiB), each in a separate process behind
the real orchestrator; all of a request's time is overhead. `model`: pico (or the checkpoint in FOLDER) through four
processes against `klein_core.pipeline` in this one, in turns; the overhead is the median of the differences. With
`--check` the exit code is 1 unless both are within their limits.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import psutil

from benchmarks.measure import Bar, command, describe_machine, finish
from benchmarks.stub_stages import SIDE_PX, STUBS
from klein_api.v1 import image_service_pb2 as api
from klein_api.v1.image_service_pb2_grpc import ImageServiceStub
from klein_services.runtime.channels import IMAGE_MESSAGE_BYTES
from klein_services.runtime.entry import keep_large_blocks
from klein_services.runtime.server import running_server
from klein_services.runtime.settings import load_settings

STUB_BAR_MS = 25.0
MODEL_BAR_MS = 10.0
WARM_UPS = 5
CACHE_FILL = 36
"""Requests after which the orchestrator's cache is full of embeddings and gets no more memory."""
STAGES = ("text-encoder", "denoiser", "vae-decoder")


async def serve_stub(stage: str) -> None:
    """Serves a stub until standard input ends; prints its address first."""
    keep_large_blocks()
    async with running_server(STUBS[stage]()) as address:
        sys.stdout.write(f"{address}\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)


async def serve_orchestrator(targets: Sequence[str]) -> None:
    """Serves the real orchestrator over the stubs until standard input ends; prints its address first."""
    from klein_services.orchestrator.servicer import Orchestrator
    from klein_services.orchestrator.settings import OrchestratorSettings

    keep_large_blocks()
    overrides = {
        "model_name": "stub",
        "text_encoder_target": targets[0],
        "denoiser_target": targets[1],
        "vae_decoder_target": targets[2],
        "port": 0,
        "metrics_port": 0,
        "drain_delay_seconds": 0,
    }
    settings = load_settings(OrchestratorSettings, os.environ, overrides).settings
    async with running_server(Orchestrator(settings, settings.table()), settings) as address:
        sys.stdout.write(f"{address}\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)


@contextmanager
def other_process(*arguments: str) -> Iterator[str]:
    """Runs this script in another role and yields its address."""
    line = [sys.executable, "-m", "benchmarks.overhead", *arguments]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if process.stdout is None or process.stdin is None:
            raise RuntimeError("pipes were asked for and not made")
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


@contextmanager
def public_api(target: str) -> Iterator[ImageServiceStub]:
    """Yields a blocking client, as a script would use it."""
    options = [("grpc.max_receive_message_length", IMAGE_MESSAGE_BYTES)]
    with grpc.insecure_channel(target, options=options) as channel:
        yield ImageServiceStub(channel)


def asked(stub: ImageServiceStub, side_px: int, seed: int) -> api.GenerateImageResponse:
    """Makes one image of a prompt that is in no cache."""
    spec = api.ImageSpec(prompt=secrets.token_hex(8), seed=seed, width_px=side_px, height_px=side_px)
    return stub.GenerateImage(api.GenerateImageRequest(spec=spec), timeout=120)


def seconds_of(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def stub_overhead(rounds: int) -> Bar:
    """Measures requests to stages that compute nothing."""
    with ExitStack() as stack:
        targets = [stack.enter_context(other_process("--stub", stage)) for stage in STAGES]
        target = stack.enter_context(other_process("--orchestrator", *targets))
        stub = stack.enter_context(public_api(target))
        for _ in range(CACHE_FILL):
            last = asked(stub, SIDE_PX, 0)
        busy = cpu_seconds()
        seconds = [seconds_of(lambda: asked(stub, SIDE_PX, 0)) for _ in range(rounds)]
        busy = (cpu_seconds() - busy) / rounds * 1e3
    _show_timings(last)
    milliseconds = statistics.median(seconds) * 1e3
    print(
        f"stub: median of {rounds} {milliseconds:.1f} ms, best {min(seconds) * 1e3:.1f} ms, "
        f"{busy:.0f} ms of processor time in all five processes"
    )
    return Bar("overhead at klein-4B's tensor sizes, ms", milliseconds, STUB_BAR_MS)


def cpu_seconds() -> float:
    """Returns the processor time that this process and those that it started have used so far."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def model_overhead(rounds: int, model: str, side_px: int) -> Bar:
    """Measures a model through the suite and in this process, in turns and with equally many threads."""
    import torch

    from klein_core.pico import WEIGHTS
    from klein_core.pipeline import Pipeline
    from klein_services.cli.suite import Suite, SuiteOptions

    threads = max(1, (os.cpu_count() or 1) // 2)
    torch.set_num_threads(threads)
    options = SuiteOptions(model=model, threads=threads, device="cpu")
    pipeline = Pipeline.from_folder(WEIGHTS if model == "pico" else Path(model))
    through, inside = [], []
    with Suite(options) as suite:
        suite.wait_until_ready()
        with public_api(suite.target) as stub:
            for _ in range(WARM_UPS + rounds):
                through.append(seconds_of(lambda: asked(stub, side_px, 0)))
                inside.append(
                    seconds_of(
                        lambda: pipeline.generate_files(
                            secrets.token_hex(8), seeds=[0], width_px=side_px, height_px=side_px
                        )
                    )
                )
            _show_timings(asked(stub, side_px, 0))
    through, inside = through[WARM_UPS:], inside[WARM_UPS:]
    difference = statistics.median(t - i for t, i in zip(through, inside, strict=True)) * 1e3
    print(
        f"{Path(model).name}: median of {rounds} {statistics.median(through) * 1e3:.1f} ms through the suite, "
        f"{statistics.median(inside) * 1e3:.1f} ms in one process, difference {difference:.1f} ms"
    )
    return Bar(f"overhead with {Path(model).name}, ms", difference, MODEL_BAR_MS)


def _show_timings(response: api.GenerateImageResponse) -> None:
    for timing in response.summary.stage_timings:
        called = timing.call_duration.ToMicroseconds() / 1e3
        computed = timing.compute_duration.ToMicroseconds() / 1e3
        print(f"  {timing.operation:<16} {called:8.2f} ms called, {computed:.2f} ms computed")
    total = response.summary.total_duration.ToMicroseconds() / 1e3
    print(f"  {'in all':<16} {total:8.2f} ms in the orchestrator")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurements, or serves as a part of one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is missed")
    parser.add_argument("--rounds", type=int, default=30, help="requests to time")
    parser.add_argument("--model", default="pico", help="pico, or a checkpoint's folder")
    parser.add_argument("--size", type=int, default=128, help="width and height of the model's images")
    parser.add_argument("--only", choices=("stub", "model"), help="run one of the two measurements")
    parser.add_argument("--stub", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--orchestrator", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.stub or options.orchestrator:
        serving = serve_stub(options.stub) if options.stub else serve_orchestrator(options.orchestrator)
        asyncio.run(serving)
        return 0
    print(f"$ {command()}\n{describe_machine('grpcio', 'protobuf')}")
    bars = []
    if options.only != "model":
        bars.append(stub_overhead(options.rounds))
    if options.only != "stub":
        bars.append(model_overhead(options.rounds, options.model, options.size))
    return finish(bars, options.check)


if __name__ == "__main__":
    sys.exit(main())
