"""Contenders of `benchmarks.serve`: suites behind their public API, and whole pipelines in processes behind a queue."""

from __future__ import annotations

import asyncio
import multiprocessing
import queue
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Protocol

import grpc

from benchmarks.serve_trace import Arrival
from klein_api.v1 import image_service_pb2 as api
from klein_api.v1.image_service_pb2_grpc import ImageServiceStub
from klein_core.pico import WEIGHTS
from klein_services.cli.process import PROCESSES
from klein_services.runtime.channels import IMAGE_MESSAGE_BYTES, open_channel
from klein_services.runtime.scrape import Change, Scrape, scrape_all
from tests.e2e.fleet import running_fleet

QUEUE_LIMIT = 64
"""Requests that wait at most, in suites and before monoliths."""
START_SECONDS = 300.0
_OUTCOMES = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: "refused",
    grpc.StatusCode.DEADLINE_EXCEEDED: "expired",
}


class Target(Protocol):
    """Something that makes images."""

    name: str

    async def ask(self, arrival: Arrival, timeout_seconds: float) -> str:
        """Makes a request's images; returns its outcome: succeeded, refused, expired or failed."""

    async def used(self) -> Mapping[str, Use]:
        """Returns what each part has used since the last call."""


@dataclass
class Use:
    """Time that the processes of one part have used."""

    replica_count: int = 0
    busy_seconds: float = 0.0
    """In which their devices computed for requests; of a process without a device 0."""
    cpu_seconds: float = 0.0


def total_use(uses: Sequence[Mapping[str, Use]]) -> dict[str, Use]:
    """Adds up what the same parts used in several loads."""
    found: dict[str, Use] = {}
    for use in uses:
        for name, part in use.items():
            total = found.setdefault(name, Use(part.replica_count))
            total.busy_seconds += part.busy_seconds
            total.cpu_seconds += part.cpu_seconds
    return found


@dataclass
class SuiteTarget:
    """A suite at an address; its parts' times come from their metrics pages."""

    name: str
    address: str
    pages: Sequence[str] = ()
    _stub: Any = None
    _before: Sequence[Scrape] = ()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[SuiteTarget]:
        """Keeps a connection open while the block runs."""
        # Not the suite's own client, which would wait and repeat by itself.
        async with open_channel(self.address, message_bytes=IMAGE_MESSAGE_BYTES) as channel:
            self._stub = ImageServiceStub(channel)
            yield self

    async def ask(self, arrival: Arrival, timeout_seconds: float) -> str:
        try:
            request = api.GenerateImageRequest(spec=arrival.spec())
            await self._stub.GenerateImage(request, timeout=timeout_seconds)
        except grpc.aio.AioRpcError as error:
            return _OUTCOMES.get(error.code(), "failed")
        return "succeeded"

    async def used(self) -> Mapping[str, Use]:
        if not self.pages:
            return {}
        before, after = self._before, await asyncio.to_thread(scrape_all, self.pages)
        self._before = after
        found: dict[str, Use] = {}
        for earlier, now in zip(before, after, strict=bool(before)):
            change = Change(earlier, now)
            for process in PROCESSES:
                if now.value("klein_serving", stage=process) is None:
                    continue
                use = found.setdefault(process, Use())
                # Requests share the denoiser's steps, so only its steps are time of its device.
                metric = (
                    "klein_denoise_step_seconds" if process == "denoiser" else "klein_stage_duration_seconds"
                )
                use.replica_count += 1
                use.busy_seconds += change.increase(f"{metric}_sum", stage=process) or 0.0
                use.cpu_seconds += change.increase("process_cpu_seconds_total") or 0.0
        return found


@asynccontextmanager
async def own_suite(name: str, folder: Path, packing: str, denoiser_count: int) -> AsyncIterator[SuiteTarget]:
    """Runs a suite of pico with so many denoisers and one of each other stage, one thread each."""
    settings = {"KLEIN_PACKING": packing, "KLEIN_QUEUE_LIMIT": str(QUEUE_LIMIT)}
    counts = {"denoiser": denoiser_count}
    with running_fleet(folder, counts, settings=settings, has_metrics=True) as fleet:
        replicas = [fleet.orchestrator, *(each for pool in fleet.replicas.values() for each in pool)]
        pages = [each.metrics_address for each in replicas]
        async with SuiteTarget(name, fleet.target, pages).running() as target:
            yield target


@dataclass
class Monoliths:
    """Processes that each hold a whole pipeline and take requests from one bounded queue, first come first served.

    They get what any such server would have: an answer when the queue is full, and no work for requests whose clients
    have gone. There is no network between client and queue.
    """

    name: str
    processes: Sequence[SpawnProcess]
    tasks: Any
    results: Any
    _waiting: dict[int, asyncio.Future[str]] = field(default_factory=dict)
    _next: int = 0
    _use: Use = field(default_factory=Use)

    async def ask(self, arrival: Arrival, timeout_seconds: float) -> str:
        if len(self._waiting) >= QUEUE_LIMIT + len(self.processes):
            return "refused"
        number, self._next = self._next, self._next + 1
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        self.tasks.put((number, time.time() + timeout_seconds, arrival))
        try:
            return await asyncio.wait_for(future, timeout_seconds)
        except TimeoutError:
            return "expired"
        finally:
            del self._waiting[number]

    async def used(self) -> Mapping[str, Use]:
        use, self._use = self._use, Use()
        use.replica_count = len(self.processes)
        return {"pipeline": use}

    async def receive(self) -> None:
        """Hands results to those who wait for them, until it is cancelled."""
        while True:
            try:
                number, outcome, seconds, cpu_seconds = await asyncio.to_thread(self.results.get, True, 0.2)
            except queue.Empty:
                continue
            self._use.busy_seconds += seconds
            self._use.cpu_seconds += cpu_seconds
            future = self._waiting.get(number)
            if future is not None and not future.done():
                future.set_result(outcome)


@asynccontextmanager
async def monoliths(name: str, count: int) -> AsyncIterator[Monoliths]:
    """Runs so many processes with a pipeline of pico each, one thread each."""
    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    processes = [context.Process(target=serve_pipeline, args=(tasks, results)) for _ in range(count)]
    for process in processes:
        process.start()
    target = Monoliths(name, processes, tasks, results)
    try:
        for _ in processes:
            await asyncio.to_thread(results.get, True, START_SECONDS)
        receiving = asyncio.create_task(target.receive())
        try:
            yield target
        finally:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def serve_pipeline(tasks: Any, results: Any) -> None:
    """Makes images in a process of its own until it is terminated."""
    import torch

    from klein_core.pipeline import Pipeline
    from klein_core.vae_decoder.image_io import encode_image

    torch.set_num_threads(1)
    pipeline = Pipeline.from_folder(WEIGHTS)
    list(pipeline.generate("", width_px=64, height_px=64))
    results.put(None)
    while True:
        number, deadline, arrival = tasks.get()
        if time.time() > deadline:
            results.put((number, "expired", 0.0, 0.0))
            continue
        begun, cpu_begun = time.monotonic(), time.process_time()
        try:
            [pixels] = pipeline.generate(
                arrival.prompt,
                references=arrival.references,
                width_px=arrival.kind.side_px,
                height_px=arrival.kind.side_px,
                step_count=arrival.kind.steps,
                seeds=[arrival.seed],
            )
            encode_image(pixels, "png")
            outcome = "succeeded"
        # The benchmark reports how many failed; the next request must still be served.
        except Exception as error:
            outcome = "failed"
            print(f"a pipeline failed: {error!r}", file=sys.stderr)
        results.put((number, outcome, time.monotonic() - begun, time.process_time() - cpu_begun))
