"""Closed loop of autoscaling without a cluster: real replicas, a real Prometheus, the manifests' own triggers.

    python -m benchmarks.autoscaling [--speed 15] [--modes prometheus external blind] [--plot FILE] [--check]

Denoisers are processes on 127.0.0.x behind a local DNS name, in front of them the real orchestrator with pico's other
stages. A model of KEDA and the HPA reads the ScaledObjects of deploy/kubernetes/components, asks Prometheus their exact
query or the orchestrator's external scaler, and starts and stops replicas: SIGTERM, drain, exit. Poisson arrivals step
up and down again. `blind` stops Prometheus while the load falls: no replica may go. `--speed` divides every period of
the manifests; ranges inside queries, starts of replicas and the time of a request keep their real length. A replica's
device only waits, and replicas are forked with their modules imported (`benchmarks.preloaded`): neither competes for
processors.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc

from benchmarks.autoscaler import (
    SYNC_SECONDS,
    Autoscaler,
    ExternalTrigger,
    PrometheusTrigger,
    ScaledObject,
    ScalerError,
    Trigger,
)
from benchmarks.autoscaling_plot import plot
from benchmarks.autoscaling_record import RECOVERED, WINDOW_SECONDS, Load, Record
from benchmarks.local_dns import free_port, local_dns
from benchmarks.measure import Bar, command, describe_machine, finish
from benchmarks.replica_processes import Processes, Replica, processes, public_channel
from klein_api.v1 import image_service_pb2 as api
from klein_api.v1.image_service_pb2_grpc import ImageServiceStub

ROOT = Path(__file__).resolve().parents[1]
COMPONENTS = ROOT / "deploy" / "kubernetes" / "components"
MANIFESTS = {
    "prometheus": COMPONENTS / "keda" / "denoiser.yaml",
    "external": COMPONENTS / "keda-external" / "denoiser.yaml",
    "blind": COMPONENTS / "keda" / "denoiser.yaml",
}
MODES = tuple(MANIFESTS)
SCRAPE_SECONDS = 15.0
"""Interval of the PodMonitor."""
STEP_SECONDS, STEPS, SIDE_PX = 0.25, 4, 64


class ReplicaSet:
    """The denoiser's Deployment: keeps as many replicas as the autoscaler wants."""

    def __init__(self, running: Processes, record: Record, started: float) -> None:
        self.desired = 1
        self.serving: list[Replica] = []
        self._running = running
        self._record = record
        self._started = started
        self._starting = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._errors: list[BaseException] = []

    def scale(self, desired: int) -> None:
        """Starts or stops replicas so that there are `desired`."""
        self.desired = desired
        while len(self.serving) + self._starting < desired:
            self._starting += 1
            self._spawn(self._start())
        while len(self.serving) + self._starting > desired and self.serving:
            self._spawn(self._stop(self.serving.pop()))

    async def settled(self) -> None:
        """Waits until every start and stop is over.

        Raises:
            RuntimeError: a replica did not start, now or before.
        """
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._errors:
            raise self._errors[0]

    async def _start(self) -> None:
        replica = self._running.start(
            "denoiser", step_seconds=STEP_SECONDS, settings={"warmup_sizes": f"{SIDE_PX}x{SIDE_PX}"}
        )
        await replica.serving()
        self._record.cold_starts.append(time.monotonic() - replica.started_at)
        self._starting -= 1
        self.serving.append(replica)
        self._publish()
        self.scale(self.desired)

    async def _stop(self, replica: Replica) -> None:
        # As in Kubernetes: out of DNS first, then the signal.
        self._publish()
        await asyncio.sleep(0.5)
        replica.terminate()
        self._record.exit_codes.append(await replica.stopped())

    def _publish(self) -> None:
        self._running.publish("denoiser", self.serving)
        write_targets(self._running.folder, self.serving)
        self._record.serving.append((time.monotonic() - self._started, len(self.serving)))

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._errors.append(error)


def write_targets(folder: Path, replicas: Sequence[Replica]) -> None:
    """Writes what Prometheus scrapes, with the labels that the PodMonitor gives."""
    targets = [
        {"targets": [f"{each.host}:{each.metrics_port}"], "labels": {"namespace": "klein", "job": each.stage}}
        for each in replicas
    ]
    partial = folder / "targets.new"
    partial.write_text(json.dumps(targets))
    partial.replace(folder / "targets.json")


class Prometheus:
    """A Prometheus process that can be stopped and started again."""

    def __init__(self, program: str, folder: Path, speed: float) -> None:
        self._program, self._folder, self._port = program, folder, free_port()
        self.address = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None
        # JSON is YAML.
        config = {
            "global": {"scrape_interval": f"{SCRAPE_SECONDS / speed * 1000:.0f}ms", "scrape_timeout": "1s"},
            "scrape_configs": [
                {"job_name": "denoiser", "file_sd_configs": [{"files": [str(folder / "targets.json")]}]}
            ],
        }
        if SCRAPE_SECONDS / speed < 1:
            config["global"]["scrape_timeout"] = config["global"]["scrape_interval"]  # type: ignore[index]
        (folder / "prometheus.yml").write_text(json.dumps(config))

    def start(self) -> None:
        with (self._folder / "prometheus.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._program,
                    f"--config.file={self._folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={self._folder / 'tsdb'}",
                    f"--web.listen-address=127.0.0.1:{self._port}",
                    "--log.level=warn",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=30)
            self._process = None


async def arrivals(stub: ImageServiceStub, record: Record, started: float, seed: int) -> None:
    """Sends requests at random times, whether or not the earlier ones are answered, and waits for all answers."""
    chance, tasks, numbers = random.Random(seed), set(), itertools.count(1)

    async def one(number: int) -> None:
        begun = time.monotonic()
        spec = api.ImageSpec(
            prompt="a red circle", seed=number, width_px=SIDE_PX, height_px=SIDE_PX, step_count=STEPS
        )
        try:
            await stub.GenerateImage(api.GenerateImageRequest(spec=spec), timeout=240)
            record.answers.append((begun - started, time.monotonic() - begun))
        except grpc.aio.AioRpcError as error:
            record.failures.append((begun - started, f"{error.code().name}: {error.details()}"))

    due = time.monotonic()
    while (elapsed := due - started) < record.load.seconds:
        due += chance.expovariate(record.load.rate(elapsed))
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        task = asyncio.create_task(one(next(numbers)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


async def control(
    replicas: ReplicaSet, scaler: Autoscaler, trigger: Trigger, record: Record, started: float, speed: float
) -> None:
    """Runs the HPA's rounds until it is cancelled."""
    while True:
        value: float | None = None
        try:
            value = await trigger.value()
            record.values.append((time.monotonic() - started, value))
        except ScalerError as error:
            print(f"  {time.monotonic() - started:6.1f} s no value: {error}")
        now = time.monotonic()
        desired = scaler.sync(now, replicas.desired, value)
        if desired != replicas.desired:
            shown = "none" if value is None else f"{value:.2f}"
            print(f"  {now - started:6.1f} s {record.mode}: backlog {shown}, {replicas.desired} -> {desired}")
        record.desired.append((now - started, desired))
        replicas.scale(desired)
        await asyncio.sleep(SYNC_SECONDS / speed)


@asynccontextmanager
async def suite(running: Processes) -> AsyncIterator[Replica]:
    """Starts the processes that are not scaled; yields the orchestrator."""
    encoder, decoder = running.start("text-encoder"), running.start("vae-decoder")
    running.publish("text-encoder", [encoder])
    running.publish("vae-decoder", [decoder])
    orchestrator = running.start(
        "orchestrator",
        settings={
            "text_encoder_target": running.target("text-encoder"),
            "denoiser_target": running.target("denoiser"),
            "vae_decoder_target": running.target("vae-decoder"),
            "scaler_settle_seconds": 1.0,
        },
    )
    await asyncio.gather(*(each.serving() for each in (encoder, decoder, orchestrator)))
    yield orchestrator


async def run_mode(mode: str, load: Load, speed: float, dnsmasq: str, prometheus_program: str) -> Record:
    """Runs the loop once and returns what it saw."""
    scaled_object = ScaledObject.read(MANIFESTS[mode])
    record = Record(mode, load)
    with tempfile.TemporaryDirectory() as name, local_dns(dnsmasq, Path(name)) as dns:
        folder = Path(name)
        write_targets(folder, [])
        prometheus = Prometheus(prometheus_program, folder, speed)
        async with processes(folder, dns) as running, suite(running) as orchestrator:
            async with public_channel(orchestrator.address) as channel:
                try:
                    prometheus.start()
                    await _loop(record, scaled_object, running, prometheus, channel, speed)
                finally:
                    prometheus.stop()
    return record


async def _loop(
    record: Record,
    scaled_object: ScaledObject,
    running: Processes,
    prometheus: Prometheus,
    channel: grpc.aio.Channel,
    speed: float,
) -> None:
    load, started = record.load, time.monotonic()
    replicas = ReplicaSet(running, record, started)
    replicas.scale(1)
    await replicas.settled()
    trigger: Trigger = PrometheusTrigger(scaled_object.metadata, prometheus.address)
    if scaled_object.trigger != "prometheus":
        trigger = ExternalTrigger(scaled_object.metadata, channel)
    stub = ImageServiceStub(channel)
    # The first request measures, so that the time of the next ones is known.
    spec = api.ImageSpec(prompt="a red circle", width_px=SIDE_PX, height_px=SIDE_PX, step_count=STEPS)
    await stub.GenerateImage(api.GenerateImageRequest(spec=spec), timeout=240)
    await asyncio.sleep(2 * SCRAPE_SECONDS / speed)
    started = replicas._started = time.monotonic()
    record.target = await trigger.target()
    scaler = Autoscaler(scaled_object, record.target, speed)
    record.serving[:] = [(0.0, 1)]
    controlling = asyncio.create_task(control(replicas, scaler, trigger, record, started, speed))
    arriving = asyncio.create_task(arrivals(stub, record, started, seed=7))
    try:
        if record.mode == "blind":
            await asyncio.sleep(load.before_seconds + load.peak_seconds)
            stopped = time.monotonic()
            prometheus.stop()
            # Longer than the stabilization window, after which a value of 0 would remove replicas.
            await asyncio.sleep(scaled_object.down.stabilization_seconds / speed + 60 / speed * 3)
            prometheus.start()
            record.blind = (stopped - started, time.monotonic() - started)
        await asyncio.wait((arriving, controlling), return_when=asyncio.FIRST_COMPLETED)
        if controlling.done():
            controlling.result()
    finally:
        controlling.cancel()
        await asyncio.gather(controlling, return_exceptions=True)
        await arriving
        await replicas.settled()


def bars(record: Record) -> list[Bar]:
    """Prints a run in one line and returns its limits."""
    load = record.load
    end = load.before_seconds + load.peak_seconds
    before, over = record.p95(0, load.before_seconds), record.p95(load.before_seconds, end)
    last = record.p95(end - 2 * WINDOW_SECONDS, end)
    print(
        f"{record.mode}: {len(record.answers)} requests, {len(record.failures)} lost; replicas 1 to {record.most} "
        f"and back to {record.desired[-1][1]}, {record.replica_seconds:.0f} replica seconds; first decision "
        f"{record.reaction_seconds:.1f} s after the step, p95 recovered after {record.recovery_seconds:.0f} s, one "
        f"replica {record.scale_in_seconds:.0f} s after the step; p95 before {before:.2f} s, over the step "
        f"{over:.2f} s, its last {2 * WINDOW_SECONDS:.0f} s {last:.2f} s; largest backlog "
        f"{max(value for _, value in record.values):.0f} s; cold starts "
        f"{', '.join(f'{seconds:.1f}' for seconds in record.cold_starts[1:])} s; exit codes {record.exit_codes}"
    )
    for at, failure in record.failures[:3]:
        print(f"  lost at {at:.1f} s: {failure}")
    limits = [
        Bar(f"{record.mode}: requests lost", len(record.failures), 0),
        Bar(f"{record.mode}: most replicas", record.most, 2, at_most=False),
        Bar(f"{record.mode}: bad exits", sum(code != 0 for code in record.exit_codes), 0),
    ]
    if record.blind is None:
        limits.append(Bar(f"{record.mode}: p95 at the end of the step / before it", last / before, RECOVERED))
        limits.append(Bar(f"{record.mode}: replicas at the end", record.desired[-1][1], 1))
    else:
        begin, back = record.blind
        counts = [count for at, count in record.desired if begin <= at <= back]
        limits.append(Bar("blind: replicas removed without Prometheus", counts[0] - min(counts), 0))
    return limits


def program(name: str) -> str:
    """Returns a program that deploy/tools/install.sh unpacked, or that is on PATH."""
    found = shutil.which(name, path=str(ROOT / ".tools" / "bin")) or shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is missing: run deploy/tools/install.sh")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the modes one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is missed")
    parser.add_argument("--speed", type=float, default=15, help="divisor of the manifests' periods")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="runs to make")
    parser.add_argument(
        "--plot", type=Path, help="file of the plot, for example docs/pictures/autoscaling.png"
    )
    options = parser.parse_args(arguments)
    print(f"$ {command()}\n{describe_machine('grpcio', 'protobuf')}")
    records = [
        asyncio.run(run_mode(mode, Load(), options.speed, program("dnsmasq"), program("prometheus")))
        for mode in options.modes
    ]
    limits = [bar for record in records for bar in bars(record)]
    if options.plot:
        plot(records, options.plot, options.speed)
    return finish(limits, options.check)


if __name__ == "__main__":
    sys.exit(main())
