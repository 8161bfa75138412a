"""Admission over real processes: clients that obey retry delays, encodings of refused requests, and silent requests.

    python -m benchmarks.admission [--check] [--seconds 20] [--rounds 2] [--part obey|silent]

`obey`: 4 clients and 40, in turns, ask a suite of pico that takes 8 requests; each refused client waits for the delay
in `RetryInfo`. Once the orchestrator has the limit, once the denoiser. Every prompt is new, so each encoding counts.
Steps take at least 0.15 s, in which the device waits instead of computing, so that goodput does not depend on what
else this machine does.
`silent`: 64 calls of the denoiser announce a request and send no tensor, which fills its queue; before, meanwhile
and after, clients of the orchestrator ask for images.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from benchmarks.measure import Bar, command, describe_machine, finish
from benchmarks.replica_processes import Replica, processes
from klein_api.v1 import denoiser_service_pb2, image_pb2
from klein_api.v1 import image_service_pb2 as api
from klein_api.v1.denoiser_service_pb2_grpc import DenoiserServiceStub
from klein_api.v1.image_service_pb2_grpc import ImageServiceStub
from klein_services.runtime.channels import IMAGE_MESSAGE_BYTES, open_channel
from klein_services.runtime.scrape import scrape
from klein_services.runtime.status import explain

PARTS = ("obey", "silent")
PLACES = 8
FEW, MANY = 4, 40
SIDE_PX = 64
REQUEST_SECONDS = 120.0
GOODPUT_LIMIT, REFUSALS_LIMIT = 0.9, 3.0
SILENT_COUNT, SILENT_SHARE = 64, 16
SILENT_LIMIT_SECONDS = 12.0
"""Ten seconds are the setting; the rest is for a busy machine."""
STEP_SECONDS = 0.15
_NUMBERS = itertools.count()


@dataclass
class Answers:
    """What clients got."""

    succeeded: int = 0
    in_time: int = 0
    """Images that came before the end, without those of requests that were still under way."""
    refused: int = 0
    failed: int = 0
    seconds: float = 0.0

    @property
    def goodput(self) -> float:
        """Images a second."""
        return self.in_time / self.seconds


@dataclass(frozen=True)
class Stand:
    """The four processes."""

    text_encoder: Replica
    denoiser: Replica
    vae_decoder: Replica
    orchestrator: Replica

    def encodings(self) -> float:
        """Returns the prompts that the text-encoder has encoded."""
        page = scrape(f"{self.text_encoder.host}:{self.text_encoder.metrics_port}")
        return page.value("klein_stage_duration_seconds_count", operation="encode-prompt") or 0.0


@asynccontextmanager
async def stand(door: str = "", limit: int = 64) -> AsyncIterator[Stand]:
    """Runs a suite in which one process takes so many requests."""
    with tempfile.TemporaryDirectory() as folder:
        async with processes(Path(folder)) as running:
            encoder, decoder = running.start("text-encoder"), running.start("vae-decoder")
            limits: dict[str, dict[str, object]] = {door: {"queue_limit": limit}}
            denoiser = running.start("denoiser", step_seconds=STEP_SECONDS, settings=limits.get("denoiser"))
            targets = {
                "text_encoder_target": encoder.address,
                "denoiser_target": denoiser.address,
                "vae_decoder_target": decoder.address,
                **limits.get("orchestrator", {}),
            }
            orchestrator = running.start("orchestrator", settings=targets)
            made = Stand(encoder, denoiser, decoder, orchestrator)
            await asyncio.gather(*(each.serving() for each in (encoder, decoder, denoiser, orchestrator)))
            yield made


async def obedient_client(target: str, ends_at: float, answers: Answers) -> None:
    """Asks for images one after the other; when refused, waits for as long as the server asks and repeats."""
    # Not the suite's own client, which would wait and repeat by itself.
    async with open_channel(target, message_bytes=IMAGE_MESSAGE_BYTES) as channel:
        stub = ImageServiceStub(channel)
        while time.monotonic() < ends_at:
            spec = api.ImageSpec(
                prompt=f"a red heart {next(_NUMBERS)}", width_px=SIDE_PX, height_px=SIDE_PX, seed=1
            )
            try:
                await stub.GenerateImage(api.GenerateImageRequest(spec=spec), timeout=REQUEST_SECONDS)
                answers.succeeded += 1
                answers.in_time += time.monotonic() < ends_at
            except grpc.aio.AioRpcError as error:
                delay = explain(error).retry_after_seconds
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED or delay is None:
                    answers.failed += 1
                    await asyncio.sleep(0.1)
                    continue
                answers.refused += 1
                await asyncio.sleep(min(delay, max(ends_at - time.monotonic(), 0.0)))


async def obey(suite: Stand, client_count: int, seconds: float) -> Answers:
    """Lets so many clients ask for so long, and waits for the requests that are under way."""
    answers, ends_at = Answers(seconds=seconds), time.monotonic() + seconds
    await asyncio.gather(
        *(obedient_client(suite.orchestrator.address, ends_at, answers) for _ in range(client_count))
    )
    return answers


async def obedience(door: str, seconds: float, rounds: int) -> list[Bar]:
    """Measures few clients and many in turns, with the limit at one process."""
    async with stand(door, PLACES) as suite:
        await obey(suite, FEW, 2.0)
        few, many, encoded = [], [], 0.0
        for _ in range(rounds):
            few.append(await obey(suite, FEW, seconds))
            before = await asyncio.to_thread(suite.encodings)
            many.append(await obey(suite, MANY, seconds))
            encoded += await asyncio.to_thread(suite.encodings) - before
    succeeded = sum(each.succeeded for each in many)
    refused = sum(each.refused for each in many)
    ratio = statistics.median(b.goodput / a.goodput for a, b in zip(few, many, strict=True))
    for name, rows in ((FEW, few), (MANY, many)):
        for row in rows:
            print(
                f"limit of the {door}, {name:2} clients: {row.goodput:5.2f} images/s, "
                f"{row.succeeded} succeeded, {row.refused} refused, {row.failed} failed"
            )
    return [
        Bar(f"{door}: goodput of {MANY} clients / of {FEW}", ratio, GOODPUT_LIMIT, at_most=False),
        Bar(f"{door}: refusals for each success", refused / max(succeeded, 1), REFUSALS_LIMIT),
        Bar(f"{door}: encodings beyond one for each success", encoded - succeeded, 0),
        Bar(f"{door}: failed requests", sum(each.failed for each in (*few, *many)), 0),
    ]


async def announce(stub: DenoiserServiceStub, ends: list[tuple[float, str]]) -> None:
    """Announces a request, sends nothing more, and notes when and how the call ends."""

    async def spec_only() -> AsyncIterator[denoiser_service_pb2.DenoiseLatentsRequest]:
        spec = denoiser_service_pb2.DenoiseSpec(
            width_px=SIDE_PX, height_px=SIDE_PX, seeds=[1], priority=image_pb2.PRIORITY_INTERACTIVE
        )
        yield denoiser_service_pb2.DenoiseLatentsRequest(spec=spec)
        await asyncio.Event().wait()

    begun = time.monotonic()
    try:
        async for _ in stub.DenoiseLatents(spec_only()):
            pass
        reason = "ended"
    except grpc.aio.AioRpcError as error:
        reason = explain(error).reason or error.code().name
    ends.append((time.monotonic() - begun, reason))


async def silence(suite: Stand) -> list[Bar]:
    """Fills the denoiser's queue with silent requests, and asks for images meanwhile."""
    ends: list[tuple[float, str]] = []
    alone = [await obey(suite, FEW, SILENT_LIMIT_SECONDS / 2)]
    async with open_channel(suite.denoiser.address) as channel:
        stub = DenoiserServiceStub(channel)
        silent = [asyncio.create_task(announce(stub, ends)) for _ in range(SILENT_COUNT)]
        page = f"{suite.denoiser.host}:{suite.denoiser.metrics_port}"
        announced = 0.0
        while announced < SILENT_COUNT:
            await asyncio.sleep(0.05)
            announced = (await asyncio.to_thread(scrape, page)).value("klein_queue_depth") or 0.0
        next_to = await obey(suite, FEW, SILENT_LIMIT_SECONDS)
        left = await asyncio.to_thread(scrape, page)
        for call in silent:
            call.cancel()
        await asyncio.gather(*silent, return_exceptions=True)
    alone.append(await obey(suite, FEW, SILENT_LIMIT_SECONDS / 2))
    goodput = statistics.mean(each.goodput for each in alone)
    reasons = {name: sum(reason == name for _, reason in ends) for name in sorted({r for _, r in ends})}
    print(
        f"{SILENT_COUNT} silent requests: {FEW} clients alone {goodput:.2f} images/s; next to them "
        f"{next_to.goodput:.2f}, {next_to.succeeded} succeeded, {next_to.refused} refused, {next_to.failed} failed; "
        f"silent ones ended: {reasons}, the last after {max((at for at, _ in ends), default=0):.1f} s; "
        f"{left.value('klein_queue_depth'):g} left"
    )
    return [
        Bar("goodput next to silent requests / alone", next_to.goodput / goodput, 0.8, at_most=False),
        Bar("requests refused or failed next to them", next_to.refused + next_to.failed, 0),
        Bar("silent requests left", left.value("klein_queue_depth") or 0.0, SILENT_SHARE),
        Bar(
            "s until the last of the others ended",
            max((at for at, _ in ends), default=0),
            SILENT_LIMIT_SECONDS,
        ),
    ]


async def measured(parts: Sequence[str], seconds: float, rounds: int) -> list[Bar]:
    """Returns the numbers of the parts."""
    bars: list[Bar] = []
    if "obey" in parts:
        for door in ("orchestrator", "denoiser"):
            bars += await obedience(door, seconds, rounds)
    if "silent" in parts:
        async with stand() as suite:
            bars += await silence(suite)
    return bars


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 when a limit is missed")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of one measurement of `obey`")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of few and many clients")
    parser.add_argument("--part", choices=PARTS, action="append", help="both by default")
    arguments = parser.parse_args()
    print(f"{command()}\n{describe_machine('torch', 'grpcio')}")
    bars = asyncio.run(measured(arguments.part or PARTS, arguments.seconds, arguments.rounds))
    return finish(bars, arguments.check)


if __name__ == "__main__":
    sys.exit(main())
