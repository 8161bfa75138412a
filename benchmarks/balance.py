"""Balance over replicas behind a DNS name: real processes, gRPC's weighted_round_robin and load reports.

    python -m benchmarks.balance [--check] [--seconds 90] [--clients 12]

Three denoisers behind one name, one of them ten times slower, and closed-loop clients of the orchestrator: the share of
requests that the slow one gets. Then a new replica is published: the time until it has done a request. Then SIGHUP
moves the route to the other replicas and back under load: every request must succeed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from benchmarks.local_dns import local_dns
from benchmarks.measure import Bar, command, describe_machine, finish
from benchmarks.replica_processes import Processes, Replica, processes, public_channel
from klein_api.v1 import image_service_pb2 as api
from klein_api.v1.image_service_pb2_grpc import ImageServiceStub

FAST_SECONDS, SLOW_SECONDS = 0.25, 2.5
"""Least time of a step."""
STEPS = 4
SIDE_PX = 64
SHARE_BAR, NEW_BAR_SECONDS = 0.06, 3.0
DONE = 'klein_stage_duration_seconds_count{operation="denoise",stage="denoiser"}'


@dataclass
class ClosedLoop:
    """Clients that send their next request when the last one is done."""

    stub: ImageServiceStub
    model: str = ""
    made: int = 0
    failures: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def running(self, clients: int) -> AsyncIterator[ClosedLoop]:
        """Keeps so many requests in flight while the block runs; waits for the last ones."""
        is_over = False
        seeds = itertools.count(1)

        async def client() -> None:
            while not is_over:
                spec = api.ImageSpec(
                    prompt="a red circle", seed=next(seeds), width_px=SIDE_PX, height_px=SIDE_PX,
                    step_count=STEPS, model=self.model,
                )  # fmt: skip
                try:
                    await self.stub.GenerateImage(api.GenerateImageRequest(spec=spec), timeout=120)
                    self.made += 1
                except grpc.aio.AioRpcError as error:
                    self.failures.append(f"{error.code().name}: {error.details()}")
                    await asyncio.sleep(0.2)

        tasks = [asyncio.create_task(client()) for _ in range(clients)]
        try:
            yield self
        finally:
            is_over = True
            await asyncio.gather(*tasks)


def requests_done(replica: Replica) -> int:
    """Returns the requests that a denoiser has finished, from its metrics."""
    with urllib.request.urlopen(f"http://{replica.host}:{replica.metrics_port}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    return int(next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(DONE)))


@dataclass
class Stand:
    """A suite whose denoisers are several processes behind one name."""

    processes: Processes
    orchestrator: Replica
    stub: ImageServiceStub
    table: Path
    fast: list[Replica]
    slow: Replica

    def route(self, replicas: Sequence[Replica] | None = None) -> None:
        """Writes the routing table: the denoisers' name, or the addresses of some of them."""
        names = self.processes
        chosen = names.target("denoiser") if replicas is None else _addresses(replicas)
        self.table.write_text(
            "[models.pico]\ndefault_size_px = 64\n"
            f'text_encoder = "{names.target("text-encoder")}"\n'
            f'denoiser = "{chosen}"\n'
            f'vae_decoder = "{names.target("vae-decoder")}"\n'
        )

    def counts(self) -> dict[Replica, int]:
        return {replica: requests_done(replica) for replica in (*self.fast, self.slow)}


def _addresses(replicas: Sequence[Replica]) -> str:
    return "ipv4:" + ",".join(replica.address for replica in replicas)


@asynccontextmanager
async def stand(folder: Path, dnsmasq: str) -> AsyncIterator[Stand]:
    """Runs two fast denoisers and a slow one behind one name, and the rest of a suite."""
    with local_dns(dnsmasq, folder) as dns:
        async with processes(folder, dns) as running:
            encoder, decoder = running.start("text-encoder"), running.start("vae-decoder")
            fast = [running.start("denoiser", step_seconds=FAST_SECONDS) for _ in range(2)]
            slow = running.start("denoiser", step_seconds=SLOW_SECONDS)
            await asyncio.gather(*(each.serving() for each in (encoder, decoder, *fast, slow)))
            running.publish("text-encoder", [encoder])
            running.publish("vae-decoder", [decoder])
            running.publish("denoiser", [*fast, slow])
            table = folder / "routing.toml"
            made = Stand(running, encoder, None, table, fast, slow)  # type: ignore[arg-type]
            made.route()
            made.orchestrator = running.start("orchestrator", settings={"routing_table": table})
            await made.orchestrator.serving()
            async with public_channel(made.orchestrator.address) as channel:
                made.stub = ImageServiceStub(channel)
                yield made


async def slow_share(made: Stand, clients: int, seconds: float, report: Callable[[str], None]) -> float:
    """Returns the slow replica's share of the requests, after a time to settle."""
    loop = ClosedLoop(made.stub)
    async with loop.running(clients):
        await asyncio.sleep(seconds / 3)
        before = made.counts()
        await asyncio.sleep(seconds)
        after = made.counts()
    done = {replica: after[replica] - before[replica] for replica in after}
    total = sum(done.values())
    report(
        f"balance: {total} requests in {seconds:g} s; two fast replicas "
        f"{', '.join(str(done[replica]) for replica in made.fast)}, one ten times slower {done[made.slow]}"
    )
    if loop.failures:
        raise RuntimeError(f"requests failed: {loop.failures[:3]}")
    return done[made.slow] / total


async def new_replica_seconds(made: Stand, clients: int, report: Callable[[str], None]) -> float:
    """Returns the time from a replica's address in DNS to the first request that it has done."""
    replica = made.processes.start("denoiser", step_seconds=FAST_SECONDS)
    await replica.serving()
    cold = time.monotonic() - replica.started_at
    loop = ClosedLoop(made.stub)
    async with loop.running(clients):
        await asyncio.sleep(3)
        published = time.monotonic()
        made.processes.publish("denoiser", [*made.fast, made.slow, replica])
        while requests_done(replica) == 0:
            if time.monotonic() > published + 120:
                raise RuntimeError("the new replica got no request within 120 s")
            await asyncio.sleep(0.05)
        seconds = time.monotonic() - published
    report(
        f"new replica: serving {cold:.1f} s after its start, first request done {seconds:.2f} s after DNS had it"
    )
    if loop.failures:
        raise RuntimeError(f"requests failed: {loop.failures[:3]}")
    return seconds


async def reload_losses(made: Stand, clients: int, reloads: int, report: Callable[[str], None]) -> int:
    """Returns the requests lost while SIGHUP moves the route from pool to pool, a broken table in between."""
    loop = ClosedLoop(made.stub)
    async with loop.running(clients):
        for number in range(reloads):
            if number % 3 == 2:
                made.table.write_text("[models.pico]\n")
            else:
                made.route([made.fast[number % 2]] if number % 2 else None)
            made.orchestrator.process.send_signal(signal.SIGHUP)
            before, end = loop.made, time.monotonic() + 60
            while loop.made < before + clients and time.monotonic() < end:  # noqa: ASYNC110  # it is a counter
                await asyncio.sleep(0.05)
    report(f"reload: {reloads} signals, {loop.made} requests, {len(loop.failures)} lost {loop.failures[:3]}")
    return len(loop.failures)


async def run(seconds: float, clients: int) -> list[Bar]:
    """Runs all three measurements."""
    dnsmasq = shutil.which("dnsmasq", path=".tools/bin") or shutil.which("dnsmasq")
    if dnsmasq is None:
        raise SystemExit("dnsmasq is missing: run deploy/tools/install.sh")
    with tempfile.TemporaryDirectory() as folder:
        async with stand(Path(folder), dnsmasq) as made:
            share = await slow_share(made, clients, seconds, print)
            new_seconds = await new_replica_seconds(made, clients, print)
            lost = await reload_losses(made, clients, 12, print)
    return [
        Bar("share of a ten times slower replica", share, SHARE_BAR),
        Bar("first request of a new replica after DNS has it, s", new_seconds, NEW_BAR_SECONDS),
        Bar("requests lost while the routing table is reloaded", lost, 0),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is missed")
    parser.add_argument("--seconds", type=float, default=90, help="duration of the first measurement")
    parser.add_argument("--clients", type=int, default=12, help="requests in flight")
    options = parser.parse_args(arguments)
    print(f"$ {command()}\n{describe_machine('grpcio', 'protobuf')}")
    return finish(asyncio.run(run(options.seconds, options.clients)), options.check)


if __name__ == "__main__":
    sys.exit(main())
