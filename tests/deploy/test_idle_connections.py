"""Ten thousand idle TLS connections to a real process, which must go on to answer others."""

import asyncio
import os
import resource
import socket
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from klein_services.runtime.channels import open_channel
from tests.services.fakes.certificates import Authority
from tests.services.fakes.raw_connections import client_context, raw_connections

ROOT = Path(__file__).resolve().parents[2]
WANTED = 10_000
SPARE_FILES = 500
SPARE_SECONDS = 1800
"""Connections are opened on a busy machine, too, and none may be idle for too long meanwhile."""


@dataclass
class Neighbor:
    """A client that asks the process for its health, on one connection."""

    channel: grpc.aio.Channel
    answers: int = 0

    async def ask(self) -> None:
        stub = health_pb2_grpc.HealthStub(self.channel)
        reply = await stub.Check(
            health_pb2.HealthCheckRequest(service="klein_api.v1.ImageService"),
            timeout=60,
            wait_for_ready=not self.answers,
        )
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        self.answers += 1

    async def keep_asking(self) -> None:
        while True:
            await self.ask()
            await asyncio.sleep(0.02)


async def test_ten_thousand_idle_connections_do_not_disturb_others(tmp_path, free_port):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(WANTED, hard - SPARE_FILES)
    if count < WANTED:
        warnings.warn(
            f"a process may open {hard} files here: {count} connections instead of {WANTED}", stacklevel=1
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count + SPARE_FILES), hard))
    authority = Authority(tmp_path)
    pair = authority.issue("localhost", "127.0.0.1")
    settings = {
        "KLEIN_HOST": "127.0.0.1",
        "KLEIN_PORT": str(free_port),
        "KLEIN_METRICS_PORT": "0",
        "KLEIN_TLS_CERTIFICATE": str(pair.certificate),
        "KLEIN_TLS_KEY": str(pair.key),
        "KLEIN_MAX_CONNECTION_IDLE_SECONDS": str(SPARE_SECONDS),
        "KLEIN_MAX_CONNECTION_AGE_SECONDS": "0",
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("", "protos", "services")),
    }
    address = f"127.0.0.1:{free_port}"
    command = [sys.executable, "-m", "klein_services.orchestrator"]
    process = await asyncio.create_subprocess_exec(
        *command, env={**os.environ, **settings}, stderr=subprocess.DEVNULL
    )
    context = client_context(str(authority.file))
    try:
        async with open_channel(address, credentials=authority.credentials()) as channel:
            neighbor = Neighbor(channel)
            await neighbor.ask()
            asking = asyncio.create_task(neighbor.keep_asking())
            async with raw_connections(address, count, context, begin=True) as opened:
                before = neighbor.answers
                await asyncio.wait([asking], timeout=5)
                assert not asking.done(), asking.exception()
                assert neighbor.answers > before
                newcomer = open_channel(
                    address,
                    credentials=authority.credentials(),
                    options=(("grpc.use_local_subchannel_pool", 1),),
                )
                async with newcomer as fresh:
                    await Neighbor(fresh).ask()
                assert not await opened[-1].is_closed(0.2)
            asking.cancel()
    finally:
        process.terminate()
        await process.wait()


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
