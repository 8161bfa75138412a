"""What the suite costs over the model in one process: the public API over loopback, one request at a time.

    python -m benchmarks.overhead [--check] [--rounds 30] [--model FOLDER] [--only stub|model]

Two measurements. `stub`: three stages that compute nothing but send, check and hash tensors of klein-4B's
sizes at 1024 × 1024 (a prompt embedding of 512 × 7680 bf16, latents of 1 MiB, an image of 1.5 MiB), each a process
of its own behind the real orchestrator; all of a request's time is overhead. `model`: pico (or the checkpoint
in FOLDER) through four processes against `klein_core.pipeline` in this one, in turns; the overhead is the
median of the differences. With `--check` the exit code is 1 unless both are within their bars.
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
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil

from benchmarks.measure import Bar, command, describe_machine, finish
from klein_api.v1 import denoiser_service_pb2 as denoiser_pb2
from klein_api.v1 import (
    denoiser_service_pb2_grpc,
    text_encoder_service_pb2_grpc,
    vae_decoder_service_pb2_grpc,
)
from klein_api.v1 import image_service_pb2 as api
from klein_api.v1 import stage_service_pb2 as stage_pb2
from klein_api.v1 import text_encoder_service_pb2 as text_pb2
from klein_api.v1 import vae_decoder_service_pb2 as vae_pb2
from klein_api.v1.image_pb2 import IMAGE_FORMAT_PNG
from klein_api.v1.image_service_pb2_grpc import ImageServiceStub
from klein_api.v1.tensor_pb2 import DATA_TYPE_BF16
from services.runtime.allocator import keep_large_blocks
from services.runtime.application import Application
from services.runtime.channels import IMAGE_MESSAGE_BYTES
from services.runtime.frames import MAX_FRAME_BYTES, FrameEnvelope, FrameReader, TensorSpec, serialised_frames
from services.runtime.server import running_server
from services.runtime.settings import load_settings
from services.runtime.stages import StageServicer

STUB_BAR_MS = 25.0
MODEL_BAR_MS = 10.0
WARM_UPS = 5
CACHE_FILL = 36
"""Requests after which the orchestrator's cache is full of embeddings and gets no more memory."""
STAGES = ("text-encoder", "denoiser", "vae-decoder")
EMBEDDING = TensorSpec(DATA_TYPE_BF16, (512, 7680))
LATENTS = TensorSpec(DATA_TYPE_BF16, (64, 64, 128))
IMAGE_BYTES = 3 << 19
SIDE_PX = 1024
STEPS = 4
_PROMPT_FRAME = FrameEnvelope(text_pb2.EncodePromptResponse.PROMPT_EMBEDDING_FIELD_NUMBER)
_LATENTS_FRAME = FrameEnvelope(denoiser_pb2.DenoiseLatentsResponse.LATENTS_FIELD_NUMBER, index=0)


class StubStage(Application):
    """A stage of klein-4B's tensor sizes that computes nothing."""

    service: str

    def __init__(self) -> None:
        self.service_names = (f"klein_api.v1.{self.service}",)
        self._description = StageServicer(stage=self.name, model="stub", load=stage_pb2.StageLoad)

    def register(self, server: grpc.aio.Server) -> None:
        self._description.register(server)
        self.add(server)

    def add(self, server: grpc.aio.Server) -> None:
        raise NotImplementedError

    async def load(self) -> None:
        facts: dict[str, Any] = {
            "text-encoder": stage_pb2.TextEncoderFacts(sequence_length=512, embedding_channels=7680),
            "denoiser": stage_pb2.DenoiserFacts(
                distilled=True,
                default_step_count=STEPS,
                default_guidance_scale=1,
                embedding_channels=7680,
                latent_channels=128,
            ),
            "vae-decoder": stage_pb2.VaeDecoderFacts(latent_channels=128),
        }
        self._description.loaded(device="none", dtype="bf16", facts=facts[self.name])

    async def drain(self) -> None:
        self._description.draining()


class StubTextEncoder(StubStage, text_encoder_service_pb2_grpc.TextEncoderServiceServicer):
    """Sends the same embedding for every prompt."""

    name = "text-encoder"
    service = "TextEncoderService"
    _data = secrets.token_bytes(EMBEDDING.byte_count)

    def add(self, server: grpc.aio.Server) -> None:
        text_encoder_service_pb2_grpc.add_TextEncoderServiceServicer_to_server(self, server)

    async def EncodePrompt(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield text_pb2.EncodePromptResponse(summary=text_pb2.PromptSummary(token_count=20))
        for message in serialised_frames(memoryview(self._data), EMBEDDING, _PROMPT_FRAME):
            yield message


class StubDenoiser(StubStage, denoiser_service_pb2_grpc.DenoiserServiceServicer):
    """Takes and checks an embedding, tells of four steps, sends the same latents."""

    name = "denoiser"
    service = "DenoiserService"
    _data = secrets.token_bytes(LATENTS.byte_count)

    def add(self, server: grpc.aio.Server) -> None:
        denoiser_service_pb2_grpc.add_DenoiserServiceServicer_to_server(self, server)

    async def DenoiseLatents(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        reader = FrameReader("prompt_embedding", limit_bytes=EMBEDDING.byte_count)
        async for request in requests:
            if request.WhichOneof("part") == "prompt_embedding":
                reader.add(request.prompt_embedding)
        reader.require_finished()
        yield denoiser_pb2.DenoiseLatentsResponse(queued=denoiser_pb2.DenoiseQueued())
        yield denoiser_pb2.DenoiseLatentsResponse(started=denoiser_pb2.DenoiseStarted(step_count=STEPS))
        for step in range(1, STEPS + 1):
            yield denoiser_pb2.DenoiseLatentsResponse(
                step=denoiser_pb2.DenoiseStep(step=step, step_count=STEPS)
            )
        for message in serialised_frames(memoryview(self._data), LATENTS, _LATENTS_FRAME):
            yield message
        yield denoiser_pb2.DenoiseLatentsResponse(summary=denoiser_pb2.DenoiseSummary(step_count=STEPS))


class StubVaeDecoder(StubStage, vae_decoder_service_pb2_grpc.VaeDecoderServiceServicer):
    """Takes and checks latents, sends the same image."""

    name = "vae-decoder"
    service = "VaeDecoderService"
    _data = secrets.token_bytes(IMAGE_BYTES)

    def add(self, server: grpc.aio.Server) -> None:
        vae_decoder_service_pb2_grpc.add_VaeDecoderServiceServicer_to_server(self, server)

    async def DecodeLatents(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        reader = FrameReader("latents", limit_bytes=LATENTS.byte_count)
        async for request in requests:
            if request.WhichOneof("part") == "latents":
                reader.add(request.latents)
        reader.require_finished()
        summary = vae_pb2.DecodeSummary(
            width_px=SIDE_PX, height_px=SIDE_PX, format=IMAGE_FORMAT_PNG, size_bytes=IMAGE_BYTES
        )
        yield vae_pb2.DecodeLatentsResponse(summary=summary)
        for start in range(0, IMAGE_BYTES, MAX_FRAME_BYTES):
            yield vae_pb2.DecodeLatentsResponse(image_chunk=self._data[start : start + MAX_FRAME_BYTES])


STUBS: dict[str, Callable[[], StubStage]] = {
    "text-encoder": StubTextEncoder,
    "denoiser": StubDenoiser,
    "vae-decoder": StubVaeDecoder,
}


async def serve_stub(stage: str) -> None:
    """Serves a stub until standard input ends; prints its address first."""
    keep_large_blocks()
    async with running_server(STUBS[stage]()) as address:
        sys.stdout.write(f"{address}\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)


async def serve_orchestrator(targets: Sequence[str]) -> None:
    """Serves the real orchestrator over the stubs until standard input ends; prints its address first."""
    from services.orchestrator.application import Orchestrator
    from services.orchestrator.settings import OrchestratorSettings

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
    """Makes one image of a prompt that no cache has seen."""
    spec = api.ImageSpec(prompt=secrets.token_hex(8), seed=seed, width_px=side_px, height_px=side_px)
    return stub.GenerateImage(api.GenerateImageRequest(spec=spec), timeout=120)


def seconds_of(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def stub_overhead(rounds: int) -> Bar:
    """Measures a request that nobody computes anything for."""
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

    from klein_core.pico.location import WEIGHTS
    from klein_core.pipeline import Pipeline
    from services.cli.suite import Suite, SuiteOptions

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
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bar is missed")
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
