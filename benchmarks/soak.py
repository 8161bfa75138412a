"""Levels of real processes under mixed load, and after thousands of requests that their clients cancel.

    python -m benchmarks.soak [--check] [--seconds 900] [--cancels 3000] [--clients 3]

Runs the four processes of `klein up` with pico. Clients first ask for images of all flows, with references, masks,
adapters and several images, cancel some requests, give some a deadline that cannot be met and make some mistakes;
every answer is compared with that of an undisturbed suite. Then streams are cancelled at random moments, as many at
once as the orchestrator takes. Prints memory, descriptors and threads of each process over time, and compares the
requests that began with those that ended, by outcome. With `--check` the exit code is 1 unless all bars hold.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil

from benchmarks.measure import Bar, command, describe_machine, finish
from klein_api.v1 import image_service_pb2 as api
from klein_client import AsyncClient
from klein_services.cli.suite import Suite, SuiteOptions
from klein_services.runtime.metrics import OUTCOMES
from klein_services.runtime.scrape import Scrape, scrape
from tests.e2e.load import save_adapter, specs

SLOTS = 8
CACHE_BYTES = 4 << 20
READY_SECONDS = 300.0
REQUEST_SECONDS = 120.0
SETTLE_SECONDS = 2.0
LATEST_CANCEL_SECONDS = 0.3
SAMPLES = 30
GROWTH_MIB = 48.0
"""Memory that a process may gain between the first third of the run and its end: caches and arenas still fill then."""
METHODS = ("GenerateImage", "StreamGenerateImage")


def unseen(spec: api.ImageSpec, number: int) -> api.ImageSpec:
    """Returns the request with a prompt that no cache has."""
    changed = api.ImageSpec()
    changed.CopyFrom(spec)
    changed.prompt = f"{number} {spec.prompt}"
    return changed


@dataclass
class Level:
    """Resources of one process at one moment."""

    memory_mib: float
    descriptors: int
    threads: int


@dataclass
class Soak:
    """One run: its suite, its answers and the levels that were seen."""

    suite: Suite
    randomness: random.Random = field(default_factory=lambda: random.Random(0))
    expected: list[list[bytes]] = field(default_factory=list)
    levels: dict[str, list[Level]] = field(default_factory=dict)
    ends: Counter[str] = field(default_factory=Counter)
    """Ends of requests as their clients saw them, by status."""
    wrong: int = 0

    def orchestrator(self) -> Scrape:
        """Returns the orchestrator's metrics now."""
        return scrape(f"127.0.0.1:{self.suite.metrics_ports['orchestrator']}")

    def sample(self) -> None:
        """Adds the level of every process."""
        for process in psutil.Process().children():
            level = Level(process.memory_info().rss / 2**20, process.num_fds(), process.num_threads())
            self.levels.setdefault(process.cmdline()[-1], []).append(level)

    async def answer(self, stub: object, index: int) -> list[bytes]:
        """Returns the images of one of the requests."""
        request = api.GenerateImageRequest(spec=specs()[index])
        response = await stub.GenerateImage(request, timeout=REQUEST_SECONDS)  # type: ignore[attr-defined]
        return [image.data for image in response.images]

    async def load(self, seconds: float, client_count: int) -> None:
        """Lets clients ask for so long, and samples levels meanwhile."""
        end = time.monotonic() + seconds
        async with AsyncClient(self.suite.target) as client:
            stub = client.stub()
            self.expected = [await self.answer(stub, index) for index in range(len(specs()))]
            async with asyncio.TaskGroup() as group:
                for _ in range(client_count):
                    group.create_task(self._client(stub, end))
                while time.monotonic() < end:
                    self.sample()
                    await asyncio.sleep(seconds / SAMPLES)

    async def _client(self, stub: object, end: float) -> None:
        while time.monotonic() < end:
            index = self.randomness.randrange(len(self.expected))
            kind = self.randomness.choices(("ask", "cancel", "hurry", "mistake"), (6, 2, 1, 1))[0]
            if kind == "cancel":
                await self._cancel(stub, index)
                continue
            spec = specs()[index]
            if kind == "mistake":
                spec.step_count = -1
            seconds = 0.05 if kind == "hurry" else REQUEST_SECONDS
            try:
                call = stub.GenerateImage(api.GenerateImageRequest(spec=spec), timeout=seconds)  # type: ignore[attr-defined]
                images = [image.data for image in (await call).images]
            except grpc.aio.AioRpcError as error:
                self.ends[error.code().name] += 1
            else:
                self.ends["OK"] += 1
                self.wrong += images != self.expected[index]

    async def _cancel(self, stub: object, index: int) -> None:
        """Begins a stream and cancels it at a random moment."""
        spec = unseen(specs()[index], self.randomness.randrange(10**9))
        request = api.StreamGenerateImageRequest(spec=spec, preview_interval_steps=1)
        call = stub.StreamGenerateImage(request, timeout=REQUEST_SECONDS)  # type: ignore[attr-defined]
        await asyncio.sleep(self.randomness.uniform(0, LATEST_CANCEL_SECONDS))
        call.cancel()
        self.ends["cancelled by us"] += 1

    async def cancel_many(self, count: int) -> float:
        """Cancels so many streams, and returns the slots that are in use some seconds later."""
        async with AsyncClient(self.suite.target) as client:
            stub = client.stub()
            for first in range(0, count, SLOTS):
                batch = range(first, min(first + SLOTS, count))
                await asyncio.gather(*(self._cancel(stub, number % len(self.expected)) for number in batch))
                if first % (SLOTS * 25) == 0:
                    self.sample()
            await asyncio.sleep(SETTLE_SECONDS)
            held = self.orchestrator().value("klein_slots_in_use") or 0.0
            for index, images in enumerate(self.expected):
                self.wrong += await self.answer(stub, index) != images
        self.sample()
        return held


def growth(levels: list[Level]) -> Level:
    """Returns how much more the end of a run has than its first third, at least 0."""
    third = levels[: max(1, len(levels) // 3)]
    last = levels[-1]
    return Level(
        last.memory_mib - max(level.memory_mib for level in third),
        last.descriptors - max(level.descriptors for level in third),
        last.threads - max(level.threads for level in third),
    )


def print_levels(levels: Mapping[str, list[Level]]) -> None:
    """Prints first, largest and last levels of each process."""
    print(f"{'process':14} {'MiB first/most/last':>24} {'descriptors':>16} {'threads':>14}")
    for name, seen in levels.items():
        memory = [level.memory_mib for level in seen]
        files = [level.descriptors for level in seen]
        threads = [level.threads for level in seen]
        print(
            f"{name:14} {memory[0]:8.0f}{max(memory):8.0f}{memory[-1]:8.0f} "
            f"{files[0]:6}{max(files):5}{files[-1]:5} {threads[0]:5}{max(threads):5}{threads[-1]:4}"
        )


def balance(page: Scrape) -> tuple[float, dict[str, float]]:
    """Returns the requests that began, and those that ended by outcome."""
    started = sum(page.value("grpc_server_started_total", grpc_method=method) or 0.0 for method in METHODS)
    ended = {
        outcome: page.value("klein_request_duration_seconds_count", outcome=outcome) or 0.0
        for outcome in OUTCOMES
    }
    return started, ended


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bar is missed")
    parser.add_argument("--seconds", type=float, default=900.0, help="length of the mixed load")
    parser.add_argument("--cancels", type=int, default=3000, help="streams to cancel after it")
    parser.add_argument("--clients", type=int, default=3, help="clients of the mixed load")
    arguments = parser.parse_args()
    print(f"{command()}\n{describe_machine('torch', 'grpcio')}")
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        adapters = save_adapter(logs / "adapters")
        # A small cache is full after a few requests, so that it does not look like a leak.
        settings = {"KLEIN_QUEUE_LIMIT": str(SLOTS), "KLEIN_CACHE_BYTES": str(CACHE_BYTES)}
        options = SuiteOptions(threads=1, device="cpu", log_folder=logs, settings=settings, adapters=adapters)
        with Suite(options) as suite:
            suite.wait_until_ready(timeout_seconds=READY_SECONDS)
            soak = Soak(suite)
            asyncio.run(soak.load(arguments.seconds, arguments.clients))
            held = asyncio.run(soak.cancel_many(arguments.cancels))
            started, ended = balance(soak.orchestrator())
        tracebacks = sum(file.read_text(errors="replace").count("Traceback") for file in logs.glob("*.log"))
    print_levels(soak.levels)
    print(f"ends seen by clients: {dict(soak.ends)}")
    print(
        f"requests that began: {started:g}; ended: {', '.join(f'{name} {n:g}' for name, n in ended.items())}"
    )
    grown = {name: growth(seen) for name, seen in soak.levels.items()}
    bars = [
        Bar("requests that began less those that ended", abs(started - sum(ended.values())), 0),
        Bar("slots held 2 s after the last cancellation", held, 0),
        Bar("answers with other bytes than undisturbed", soak.wrong, 0),
        Bar("tracebacks in logs", tracebacks, 0),
        Bar("failed requests", ended["failed"], 0),
        Bar("MiB gained by one process", max(each.memory_mib for each in grown.values()), GROWTH_MIB),
        Bar("descriptors gained by one process", max(each.descriptors for each in grown.values()), 8),
        Bar("threads gained by one process", max(each.threads for each in grown.values()), 4),
    ]
    return finish(bars, arguments.check)


if __name__ == "__main__":
    sys.exit(main())
