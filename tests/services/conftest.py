"""Fixtures of the servers' tests: real servers on free ports around toy applications."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import pytest

from klein_services.runtime.channels import open_channel
from klein_services.runtime.server import running_server
from tests.services.fakes.runtime_toy import Toy
from tests.services.fakes.span_collector import SpanCollector, tracing_to_collector


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def toy() -> Toy:
    return Toy()


@pytest.fixture
async def toy_address(toy: Toy) -> AsyncIterator[str]:
    async with running_server(toy) as address:
        yield address


@pytest.fixture
async def toy_channel(toy_address: str):
    async with open_channel(toy_address) as channel:
        yield channel


@pytest.fixture
async def span_collector() -> AsyncIterator[SpanCollector]:
    async with tracing_to_collector() as collector:
        yield collector


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory):
    from tests.tiny.text_encoder import save_tiny_text_encoder
    from tests.tiny.vae import tiny_vae

    folder = tmp_path_factory.mktemp("checkpoint")
    save_tiny_text_encoder(folder)
    tiny_vae().save_pretrained(folder / "vae")
    return folder
