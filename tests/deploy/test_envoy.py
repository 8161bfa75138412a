"""Envoy in front of the orchestrator with the project's own configuration, under HTTP/2 rapid reset."""

import asyncio
import urllib.request
from pathlib import Path

import grpc
import pytest

from klein_api.v1 import image_service_pb2 as api
from klein_api.v1.image_service_pb2_grpc import ImageServiceStub
from tests.deploy.tools import ROOT, tool
from tests.services.fakes.orchestrator_suite import FakeSuite
from tests.services.fakes.raw_http2 import begun_and_reset, connect
from tests.services.fakes.runtime_toy import failure, until

CONFIGURATION = ROOT / "deploy" / "envoy" / "orchestrator.yaml"
METHOD = "/klein_api.v1.ImageService/ListModels"
REQUESTS = 500


def listener_address(admin: str) -> str:
    with urllib.request.urlopen(f"http://{admin}/listeners") as answer:
        return "127.0.0.1:" + answer.read().decode().rsplit(":", 1)[1].strip()


def reset_until_closed(address: str) -> int:
    """Resets requests until the server closes the connection; returns how many were sent."""
    sent = 0
    with connect(address) as connection:
        connection.settimeout(0.01)
        while sent < 200 * REQUESTS:
            try:
                connection.sendall(begun_and_reset(METHOD, address, REQUESTS, 1 + 2 * sent))
                sent += REQUESTS
                while connection.recv(65536):
                    pass
            except TimeoutError:
                continue
            except OSError:
                return sent
            return sent
    raise AssertionError("the connection stayed open")


@pytest.fixture
async def suite():
    async with FakeSuite().running() as running:
        yield running


@pytest.fixture
async def envoy(suite, tmp_path: Path):
    program = tool("envoy")
    port = suite.address.rpartition(":")[2]
    text = CONFIGURATION.read_text()
    for old, new in (
        ("address: 0.0.0.0, port_value: 8443", "address: 127.0.0.1, port_value: 0"),
        ("address: orchestrator, port_value: 50050", f"address: 127.0.0.1, port_value: {port}"),
    ):
        assert old in text
        text = text.replace(old, new)
    configuration, admin = tmp_path / "envoy.yaml", tmp_path / "admin"
    configuration.write_text(text)
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            program,
            *("-c", configuration, "--admin-address-path", admin, "--use-dynamic-base-id"),
            *("--concurrency", "1", "--log-level", "warning"),
            stdout=log,
            stderr=log,
        )
    try:
        await until(lambda: admin.exists() and admin.read_text(), 60)
        yield listener_address(admin.read_text())
    finally:
        process.terminate()
        await process.wait()


async def test_a_connection_that_resets_without_end_is_closed_and_others_are_served(suite, envoy):
    async with grpc.aio.insecure_channel(envoy) as channel:
        images = ImageServiceStub(channel)
        request = api.GenerateImageRequest(spec=api.ImageSpec(prompt="a star"))
        assert (await images.GenerateImage(request, wait_for_ready=True)).images
        attack = asyncio.create_task(asyncio.to_thread(reset_until_closed, envoy))
        answers = await asyncio.gather(*(images.GenerateImage(request) for _ in range(20)))
        assert all(answer.images for answer in answers)
        assert await attack <= 20 * REQUESTS
        assert (await images.GenerateImage(request)).images


async def test_only_the_public_api_passes(suite, envoy):
    async with grpc.aio.insecure_channel(envoy) as channel:
        await ImageServiceStub(channel).ListModels(api.ListModelsRequest(), wait_for_ready=True)
        for method in (
            "/grpc.health.v1.Health/Check",
            "/grpc.channelz.v1.Channelz/GetServers",
            "/externalscaler.ExternalScaler/IsActive",
        ):
            error = await failure(channel.unary_unary(method)(b""))
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED
