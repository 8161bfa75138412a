"""The health check of containers: a real server, the port of its own environment, and each exit code."""

import asyncio
import sys

import pytest

from klein_services.runtime.server import Server, running_server
from klein_services.runtime.settings import ServerSettings
from tests.services.fakes.runtime_toy import Toy, until


async def probe(*arguments: str, **environment: str) -> tuple[int, str]:
    """Returns the exit code and the output of the probe's own process."""
    command = [sys.executable, "-m", "klein_services.cli.probe", *arguments]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={"PYTHONPATH": ":".join(path for path in sys.path if path), **environment},
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_a_probe_fails_until_the_model_is_loaded_and_while_the_server_drains():
    toy = Toy()
    toy.may_load.clear()
    settings = ServerSettings(host="127.0.0.1", metrics_port=0, drain_delay_seconds=600)
    server = Server(settings, toy)
    running = asyncio.create_task(server.run())
    try:
        await until(lambda: server.port)
        here = {"KLEIN_HOST": "127.0.0.1", "KLEIN_PORT": str(server.port)}
        address = f"text-encoder at 127.0.0.1:{server.port}"
        assert await probe("text-encoder", **here) == (1, f"{address}: loading\n")
        toy.may_load.set()
        await until(lambda: server.health.is_serving)
        assert await probe("text-encoder", **here) == (0, f"{address}: ready\n")
        # Another stage's server on that port is not the one that was asked for.
        assert (await probe("denoiser", **here))[0] == 1
        server.stop_requested.set()
        await until(lambda: not server.health.is_serving)
        assert await probe("text-encoder", **here) == (1, f"{address}: loading\n")
    finally:
        server.stop_requested.set()
        server.stop_now.set()
        await running
        await toy.close()


async def test_a_probe_asks_the_health_port_where_there_is_one():
    async with running_server(Toy()) as address:
        _, _, port = address.rpartition(":")
        here = {"KLEIN_HOST": "127.0.0.1", "KLEIN_PORT": "1", "KLEIN_HEALTH_PORT": port}
        assert await probe("text-encoder", **here) == (0, f"text-encoder at {address}: ready\n")


async def test_a_probe_of_a_port_without_a_server_fails():
    code, output = await probe("denoiser", KLEIN_PORT="1")
    assert (code, output) == (1, "denoiser at localhost:1: starting\n")


@pytest.mark.parametrize(
    ("arguments", "environment", "reason"),
    [
        ((), {}, "Give one of text-encoder"),
        (("decoder",), {}, "Give one of text-encoder"),
        (("denoiser",), {"KLEIN_TLS_CERTIFICATE": "cert.pem"}, "This server needs KLEIN_HEALTH_PORT"),
        (("denoiser",), {"KLEIN_PORT": "many"}, "KLEIN_PORT is 'many'; it must be a whole number"),
    ],
)
async def test_a_probe_refuses_bad_arguments(
    arguments: tuple[str, ...], environment: dict[str, str], reason: str
) -> None:
    code, output = await probe(*arguments, **environment)
    assert code == 2
    assert output.startswith(reason)
