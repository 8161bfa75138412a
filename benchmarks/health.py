"""How quickly a denoiser answers health checks while it denoises.

    python -m benchmarks.health [--check] [--seconds 15] [--threads 0]

Starts a real denoiser process with a random transformer of moderate size, lets it denoise a long request, and
asks it from this process every 10 ms whether it is healthy. Prints p50, p99 and the maximum, idle and busy.
With `--check` the exit code is 1 unless the busy p99 is within the bar of 50 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.torch import save_file

from benchmarks.measure import Bar, command, describe_machine, finish
from klein_api.v1 import denoiser_service_pb2 as api
from klein_api.v1.denoiser_service_pb2_grpc import DenoiserServiceStub
from klein_core.checkpoint.key_maps import checkpoint_names
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.pico import WEIGHTS
from klein_core.variants import TransformerConfig
from klein_services.runtime.tensors import tensor_frames

BAR_MILLISECONDS = 50
INTERVAL_SECONDS = 0.01
START_SECONDS = 180
SIZE_PX = 512
STEPS = 1000
TEXT_TOKENS = 512
SERVICE = "klein_api.v1.DenoiserService"
CONFIG = TransformerConfig(num_layers=2, num_single_layers=6, num_attention_heads=4, joint_attention_dim=1024)


def save_model(folder: Path) -> None:
    """Writes a random checkpoint, fused projections taken apart as diffusers has them."""
    transformer = FlowTransformer(CONFIG)
    fused = checkpoint_names(CONFIG)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in transformer.state_dict().items():
        names = fused.get(name, (name,))
        parts = tensor.detach().chunk(len(names))
        tensors.update({part_name: part.clone() for part_name, part in zip(names, parts, strict=True)})
    target = folder / "transformer"
    target.mkdir()
    save_file(tensors, target / "diffusion_pytorch_model.safetensors")
    (target / "config.json").write_text(json.dumps(asdict(CONFIG)))
    shutil.copy(WEIGHTS / "model_index.json", folder)


@contextmanager
def denoiser_process(folder: Path, port: int, threads: int) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `python -m klein_services.denoiser` and stops it in the end."""
    environment = os.environ | {
        "KLEIN_MODEL_PATH": str(folder),
        "KLEIN_HOST": "127.0.0.1",
        "KLEIN_PORT": str(port),
        "KLEIN_METRICS_PORT": "0",
        "KLEIN_WARMUP_SIZES": "",
        "KLEIN_DEVICE": "cpu",
        "KLEIN_THREADS": str(threads),
        "KLEIN_LOG_LEVEL": "warning",
        "KLEIN_DRAIN_DELAY_SECONDS": "0",
    }
    process = subprocess.Popen([sys.executable, "-m", "klein_services.denoiser"], env=environment)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=30)


async def wait_until_serving(channel: grpc.aio.Channel, process: subprocess.Popen[bytes]) -> None:
    """Asks until the model is loaded.

    Raises:
        SystemExit: the process ended or takes too long.
    """
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(request, wait_for_ready=True, timeout=5)
        except grpc.aio.AioRpcError:
            continue
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            return
        await asyncio.sleep(0.1)
    raise SystemExit("the denoiser did not start; see its log above")


async def probe(channel: grpc.aio.Channel, seconds: float) -> list[float]:
    """Returns the duration of each check; one starts every 10 ms, whether or not the last was answered."""
    health = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=SERVICE)

    async def check() -> float:
        begun = time.perf_counter()
        answer = await health.Check(request, timeout=10)
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise SystemExit(f"health was {answer.status} while the denoiser worked")
        return time.perf_counter() - begun

    begun, checks = time.perf_counter(), []
    while time.perf_counter() - begun < seconds:
        checks.append(asyncio.create_task(check()))
        due = begun + len(checks) * INTERVAL_SECONDS
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
    return list(await asyncio.gather(*checks))


def long_request() -> Iterator[api.DenoiseLatentsRequest]:
    """Yields the parts of a request that runs longer than the probes."""
    spec = api.DenoiseSpec(width_px=SIZE_PX, height_px=SIZE_PX, seeds=[1], step_count=STEPS)
    yield api.DenoiseLatentsRequest(spec=spec)
    embedding = torch.randn(TEXT_TOKENS, CONFIG.joint_attention_dim)
    for frame in tensor_frames(embedding):
        yield api.DenoiseLatentsRequest(prompt_embedding=frame)


async def measure(port: int, process: subprocess.Popen[bytes], seconds: float) -> tuple[list[float], ...]:
    """Returns the seconds of checks: idle, and while the long request runs."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await wait_until_serving(channel, process)
        idle = await probe(channel, seconds / 3)
        call = DenoiserServiceStub(channel).DenoiseLatents(long_request())
        first_step, steps = asyncio.Event(), 0

        async def listen() -> None:
            nonlocal steps
            async for response in call:
                steps = max(steps, response.step.step)
                if steps:
                    first_step.set()

        listening = asyncio.create_task(listen())
        await asyncio.wait_for(first_step.wait(), START_SECONDS)
        before = steps
        busy = await probe(channel, seconds)
        if listening.done() or steps == before:
            raise SystemExit("the long request did not run while health was asked")
        print(f"{steps - before} steps of {SIZE_PX}x{SIZE_PX} ran meanwhile")
        call.cancel()
        await asyncio.gather(listening, return_exceptions=True)
    return idle, busy


def percentiles(seconds: list[float]) -> tuple[float, float, float]:
    """Returns p50, p99 and the maximum."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return cuts[49], cuts[98], max(seconds)


def free_port() -> int:
    """Returns a port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 unless the busy p99 is within the bar"
    )
    parser.add_argument("--seconds", type=float, default=15.0, help="how long to probe while busy")
    parser.add_argument("--threads", type=int, default=0, help="the denoiser's threads; 0 is torch's choice")
    arguments = parser.parse_args()
    print(command(), describe_machine("torch", "grpcio"), sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        port = free_port()
        with denoiser_process(Path(folder), port, arguments.threads) as process:
            idle, busy = asyncio.run(measure(port, process, arguments.seconds))
    print("| health check | checks | p50 ms | p99 ms | max ms |\n|---|---|---|---|---|")
    for name, seconds in (("idle", idle), ("while denoising", busy)):
        p50, p99, longest = (1000 * value for value in percentiles(seconds))
        print(f"| {name} | {len(seconds)} | {p50:.1f} | {p99:.1f} | {longest:.1f} |")
    bar = Bar("health p99 while denoising, ms", 1000 * percentiles(busy)[1], BAR_MILLISECONDS)
    return finish([bar], arguments.check)


if __name__ == "__main__":
    sys.exit(main())
