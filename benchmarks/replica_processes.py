"""Processes of the suite for benchmarks of many replicas: real servers on addresses of loopback behind DNS names."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.local_dns import LocalDns, free_port
from benchmarks.preloaded import PreloadedProcess
from klein_services.runtime.channels import IMAGE_MESSAGE_BYTES

SERVICES = {
    "text-encoder": "klein_api.v1.TextEncoderService",
    "denoiser": "klein_api.v1.DenoiserService",
    "vae-decoder": "klein_api.v1.VaeDecoderService",
    "orchestrator": "klein_api.v1.ImageService",
}
STEP_SECONDS = "KLEIN_BENCHMARK_STEP_SECONDS"
"""Variable of `benchmarks.delayed_denoiser`: least time of a step."""
START_SECONDS = 180.0
STOP_SECONDS = 120.0


@dataclass(eq=False)
class Replica:
    """One process of a stage or the orchestrator."""

    stage: str
    host: str
    port: int
    metrics_port: int
    process: subprocess.Popen[bytes] | PreloadedProcess
    log: Path
    started_at: float = field(default_factory=time.monotonic)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    async def serving(self) -> None:
        """Waits until the readiness probe succeeds.

        Raises:
            RuntimeError: the process ends, or takes too long.
        """
        request = health_pb2.HealthCheckRequest(service=SERVICES[self.stage])
        async with grpc.aio.insecure_channel(self.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while time.monotonic() < self.started_at + START_SECONDS and self.process.poll() is None:
                try:
                    answer = await health.Check(request, timeout=2)
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                except grpc.aio.AioRpcError:
                    pass  # it has not bound its port yet
                await asyncio.sleep(0.1)
        raise RuntimeError(f"{self.stage} at {self.address} did not start; see {self.log}")

    def terminate(self) -> None:
        """Begins the drain."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    async def stopped(self) -> int:
        """Waits until a terminated process has ended; kills one that takes too long. Returns its exit code."""
        try:
            return await asyncio.to_thread(self.process.wait, STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class Processes:
    """Everything that a benchmark has started; ends it all.

    Args:
        folder: where logs go.
        dns: publishes the replicas of a stage under `STAGE.klein.test`; `None` where they are called by address.
    """

    def __init__(self, folder: Path, dns: LocalDns | None = None) -> None:
        self.folder = folder
        self.dns = dns
        self.all: list[Replica] = []
        self.published: dict[str, list[Replica]] = {}
        self._ports: dict[str, int] = {}
        self._count = 0

    def target(self, stage: str) -> str:
        """Returns the gRPC target of all published replicas of a stage."""
        assert self.dns is not None
        return self.dns.target(f"{stage}.klein.test", self._port(stage))

    def start(
        self, stage: str, *, step_seconds: float | None = None, settings: Mapping[str, object] | None = None
    ) -> Replica:
        """Starts a process on an address of its own.

        Args:
            stage: its name.
            step_seconds: least time of a denoiser's step; such a denoiser is forked (`benchmarks.preloaded`).
            settings: settings besides those below, by field name.
        """
        self._count += 1
        host = (
            "127.0.0.1"
            if stage == "orchestrator"
            else f"127.0.{1 + self._count // 200}.{self._count % 200 + 1}"
        )
        values: dict[str, object] = {
            "host": host,
            "port": self._port(stage),
            "metrics_port": free_port(),
            "log_level": "info",
            "drain_delay_seconds": 1.0,
            "grace_seconds": 60.0,
        }
        if stage != "orchestrator":
            values |= {"device": "cpu", "threads": 1}
        values |= settings or {}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KLEIN_")}
        environment |= {f"KLEIN_{name.upper()}": str(value) for name, value in values.items()}
        if step_seconds is not None:
            environment[STEP_SECONDS] = str(step_seconds)
        log = self.folder / f"{stage}-{self._count}.log"
        process: subprocess.Popen[bytes] | PreloadedProcess
        if step_seconds is not None:
            process = PreloadedProcess(environment, log)
        else:
            module = f"klein_services.{stage.replace('-', '_')}"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", module], env=environment, stdout=output, stderr=subprocess.STDOUT
                )
        replica = Replica(stage, host, self._port(stage), int(str(values["metrics_port"])), process, log)
        self.all.append(replica)
        return replica

    def publish(self, stage: str, replicas: list[Replica]) -> None:
        """Makes the name of a stage resolve to these replicas."""
        assert self.dns is not None
        self.published[stage] = list(replicas)
        self.dns.publish(
            {
                f"{name}.klein.test": [replica.host for replica in each]
                for name, each in self.published.items()
            }
        )

    async def close(self) -> None:
        """Ends every process and waits for it."""
        for replica in self.all:
            replica.terminate()
        await asyncio.gather(*(replica.stopped() for replica in self.all))

    def _port(self, stage: str) -> int:
        if stage not in self._ports:
            self._ports[stage] = free_port()
        return self._ports[stage]


@asynccontextmanager
async def processes(folder: Path, dns: LocalDns | None = None) -> AsyncIterator[Processes]:
    """Yields what starts processes, and ends them all."""
    running = Processes(folder, dns)
    try:
        yield running
    finally:
        await running.close()


@asynccontextmanager
async def public_channel(address: str) -> AsyncIterator[grpc.aio.Channel]:
    """Yields a channel to the orchestrator whose calls are not retried, so that each loss is seen."""
    options = [("grpc.max_receive_message_length", IMAGE_MESSAGE_BYTES), ("grpc.enable_retries", 0)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        yield channel
