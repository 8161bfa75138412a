"""Address, TLS and token of a client; values that can be none of them are refused before a call."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from klein_api.v1 import image_service_pb2 as api
from klein_client import AsyncClient, Client, InvalidRequest, Tls, Unauthenticated, Unavailable
from klein_services.runtime.errors import Unauthenticated as RefusedToken
from klein_services.runtime.status import status_of
from tests.services.fakes.answering_orchestrator import Orchestrator, serving
from tests.services.fakes.certificates import Authority


class Guarded(Orchestrator):
    """Wants the token `good`."""

    def ListModels(self, request, context):
        if dict(context.invocation_metadata()).get("authorization") != "Bearer good":
            status = status_of(RefusedToken())
            context.set_trailing_metadata(status.trailing_metadata())
            context.abort(status.code, status.message)
        return api.ListModelsResponse()


@pytest.fixture
def guarded() -> Iterator[str]:
    with serving(Guarded()) as target:
        yield target


async def test_a_token_comes_from_the_argument_or_the_environment(
    guarded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KLEIN_TOKEN", raising=False)
    monkeypatch.setenv("KLEIN_TARGET", guarded)
    with pytest.raises(Unauthenticated):
        Client().status()
    with Client(token="bad") as client:
        with pytest.raises(Unauthenticated):
            client.models()
        client.status(token="good")
    Client(guarded, token=" good\n").status()
    monkeypatch.setenv("KLEIN_TOKEN", "good")
    Client().status()
    async with AsyncClient() as client:
        assert (await client.status()).models == ()


async def test_tls_with_files_or_their_contents(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair, own = authority.issue("server.example"), authority.issue("client.example")
    credentials = grpc.ssl_server_credentials(
        [(pair.key.read_bytes(), pair.certificate.read_bytes())], authority.file.read_bytes(), True
    )
    with serving(Orchestrator(), credentials) as target:
        files = Tls(
            ca=str(authority.file), certificate=own.certificate, key=own.key, server_name="server.example"
        )
        contents = Tls(
            ca=authority.file.read_bytes(),
            certificate=own.certificate.read_bytes(),
            key=own.key.read_bytes(),
            server_name="server.example",
        )
        for address in (target, f"grpcs://{target}", f"https://{target}/"):
            with Client(address, tls=files) as client:
                assert len(client.generate("a star")) == 1
        async with AsyncClient(target, tls=contents) as client:
            assert len(await client.generate("a star")) == 1
        for tls in (True, Tls(ca=authority.file, server_name="server.example"), False):
            with Client(target, tls=tls) as client, pytest.raises(Unavailable):
                client.status()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target": " "}, "the target is empty"),
        ({"target": "http://localhost:50050"}, "write localhost:50050, or grpcs://localhost:50050 for TLS"),
        ({"target": "https://localhost:50050/v1"}, "is a URL"),
        ({"token": "se cret"}, "characters that no token has"),
        ({"token": "ü"}, "characters that no token has"),
        ({"tls": Tls(ca="/nowhere")}, "tls: ca /nowhere cannot be read: No such file"),
        ({"tls": Tls(ca=b"no PEM")}, "tls: ca holds no certificate"),
        ({"tls": Tls(certificate=b"x")}, "tls: a certificate needs its key"),
        ({"tls": Tls(certificate=b"x", key=b"y")}, "tls: certificate and key are no pair"),
        ({"tls": Tls(ca="/dev/zero")}, "it is no PEM file"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(arguments: dict, words: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match=words) as failure:
            kind(**arguments)
        assert "se cret" not in str(failure.value)


def test_a_key_of_another_certificate_and_an_encrypted_one_are_refused(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    one, other, locked = authority.issue("a"), authority.issue("b"), authority.issue("c", password=b"secret")
    for pair in (
        Tls(certificate=one.certificate, key=other.key),
        Tls(certificate=locked.certificate, key=locked.key),
    ):
        with pytest.raises(ValueError, match="no pair in PEM format, or the key is encrypted"):
            Client(tls=pair)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds"),
        ({"timeout_seconds": float("inf")}, "timeout_seconds"),
        ({"timeout_seconds": "1"}, "timeout_seconds"),
        ({"idempotency_key": "with space"}, "idempotency-key"),
        ({"idempotency_key": "x" * 129}, "idempotency-key"),
        ({"format": "gif"}, "format"),
        ({"priority": "urgent"}, "priority"),
        ({"seed": 2**63}, "seed"),
        ({"width": 2**31}, "width_px"),
        ({"steps": 1.5}, "step_count"),
        ({"expand": (1, 2, 3)}, "expand"),
        ({"expand": (1, 2, 3, "x")}, "expand.bottom_px"),
        ({"adapters": [("ink", 1, 2)]}, "adapters[0]"),
        ({"adapters": {"ink": "strong"}}, "adapters[0].scale"),
        ({"adapters": [7]}, "adapters[0]"),
        ({"model": "\ud800"}, "model"),
    ],
)
async def test_a_value_that_fits_no_request_is_named_before_a_call(options: dict, field: str) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequest) as one:
        client.generate("a star", **options)
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(InvalidRequest) as other:
            await client.generate("a star", **options)
    assert [failure.value.violations[0].field for failure in (one, other)] == [field, field]


def test_a_number_of_numpy_is_a_number(guarded: str) -> None:
    numpy = pytest.importorskip("numpy")
    with Client(guarded) as client:
        made = client.generate("a star", width=numpy.int64(64), guidance_scale=numpy.float32(1.0))
    assert len(made) == 1
