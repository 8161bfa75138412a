"""TLS of real servers: who gets in, what replaces credentials, and what the neighbors notice of it."""

from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from klein_services.runtime.channels import open_channel
from klein_services.runtime.server import running_server
from klein_services.runtime.settings import ServerSettings
from tests.services.fakes.certificates import Authority, Pair
from tests.services.fakes.runtime_toy import call, failure

LOCAL = ("localhost", "127.0.0.1")
QUICK = ServerSettings(drain_delay_seconds=0, grace_seconds=5, metrics_port=0, tls_reload_seconds=0.1)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "stranger")


def tls(pair: Pair, client_authority: Authority | None = None, **more: object) -> ServerSettings:
    files = {"tls_certificate": str(pair.certificate), "tls_key": str(pair.key)}
    if client_authority:
        files["tls_client_ca"] = str(client_authority.file)
    return replace(QUICK, **files, **more)


async def answer(address: str, credentials=None, **options) -> bytes:
    async with open_channel(address, credentials=credentials, **options) as channel:
        return await call(channel, "unary_unary", timeout=20)


async def test_a_server_with_tls_answers_clients_that_trust_its_authority(toy, authority):
    async with running_server(toy, tls(authority.issue(*LOCAL))) as address:
        assert await answer(address, authority.credentials()) == b"x"
        plain = await failure(answer(address))
        assert plain.code() is grpc.StatusCode.UNAVAILABLE
