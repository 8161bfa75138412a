"""TLS of real servers: who gets in, what replaces credentials, and what their neighbors notice of it."""

import asyncio
import logging
import os
import ssl
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import REGISTRY

from klein_services.runtime.channels import open_channel
from klein_services.runtime.server import Server, running_server, serve
from klein_services.runtime.settings import ServerSettings
from klein_services.runtime.status import explain
from tests.services.fakes.certificates import Authority, Pair
from tests.services.fakes.runtime_toy import TEXT_ENCODER, call, failure, until

LOCAL = ("localhost", "127.0.0.1")
QUICK = ServerSettings(drain_delay_seconds=0, grace_seconds=5, metrics_port=0, tls_reload_seconds=0.05)
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
"""Channels of one process share connections otherwise."""
OURS = "orchestrator.klein.svc"
SPIFFE = "spiffe://cluster.example/ns/klein/sa/orchestrator"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "stranger")


def with_tls(pair: Pair, clients: Authority | None = None, **more: object) -> ServerSettings:
    files = {"tls_certificate": str(pair.certificate), "tls_key": str(pair.key)}
    if clients:
        files["tls_client_ca"] = str(clients.file)
    return replace(QUICK, **files, **more)


async def answer(address, credentials=None, request=b"x", **options) -> bytes:
    async with open_channel(address, credentials=credentials, options=OWN_CONNECTION, **options) as channel:
        return await call(channel, "unary_unary", request, timeout=60)


@asynccontextmanager
async def neighbor(address, credentials, pause_seconds=0.0):
    """A client that calls all the time, on one connection and on new ones; none of its calls may fail."""
    calls = 0

    async def keep_calling():
        nonlocal calls
        async with open_channel(address, credentials=credentials) as channel:
            while True:
                assert await call(channel, "unary_unary", timeout=60) == b"x"
                assert await answer(address, credentials) == b"x"
                calls += 1
                await asyncio.sleep(pause_seconds)

    task = asyncio.create_task(keep_calling())

    async def has_called_again():
        before = calls
        await until(lambda: task.done() or calls >= before + 2, 60)
        assert not task.done(), task.exception()

    await has_called_again()
    try:
        yield has_called_again
        await has_called_again()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def reloads(outcome: str, kind: str = "server") -> float:
    labels = {"stage": "text-encoder", "kind": kind, "outcome": outcome}
    return REGISTRY.get_sample_value("klein_certificate_reloads_total", labels) or 0.0


def expiry() -> float | None:
    labels = {"stage": "text-encoder", "kind": "server"}
    return REGISTRY.get_sample_value("klein_certificate_expiry_timestamp_seconds", labels)


def presented(address: str) -> str:
    host, port = address.split(":")
    return ssl.get_server_certificate((host, int(port)))


async def test_a_client_that_cannot_trust_the_server_fails_and_its_neighbors_do_not(toy, authority, stranger):
    async with running_server(toy, with_tls(authority.issue(*LOCAL))) as address:
        trusted = authority.credentials()
        port = address.rpartition(":")[2]
        async with neighbor(address, trusted):
            for why, options in (
                ("CERTIFICATE_VERIFY_FAILED", {"credentials": stranger.credentials()}),
                ("Hostname Verification", {"credentials": trusted, "server_name": "elsewhere.example"}),
                ("Socket closed", {"credentials": None}),
            ):
                error = await failure(answer(address, **options))
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                assert why in error.details()
            assert await answer(f"localhost:{port}", trusted) == b"x"


async def test_tls_to_a_plaintext_port_fails_and_its_neighbors_do_not(toy, toy_address, authority):
    async with neighbor(toy_address, None):
        error = await failure(answer(toy_address, authority.credentials()))
    assert "WRONG_VERSION_NUMBER" in error.details()


async def test_only_clients_with_a_certificate_of_the_authority_get_in(toy, authority, stranger):
    settings = with_tls(authority.issue(*LOCAL), authority)
    ours = authority.credentials(authority.issue(OURS))
    expired = authority.issue(OURS, lifetime=-timedelta(hours=1))
    refused = {
        "without a certificate": authority.credentials(),
        "of a stranger": replace(
            stranger.credentials(stranger.issue(OURS)), authorities=authority.file.read_bytes()
        ),
        "expired": replace(
            authority.credentials(),
            certificate=expired.certificate.read_bytes(),
            key=expired.key.read_bytes(),
        ),
        "in plaintext": None,
    }
    requests = []

    async def record(request, context):
        requests.append(request)
        yield request

    toy.behavior = record
    async with running_server(toy, settings) as address, neighbor(address, ours):
        for why, credentials in refused.items():
            error = await failure(answer(address, credentials, request=b"intruder"))
            assert error.code() is grpc.StatusCode.UNAVAILABLE, why
    assert set(requests) == {b"x"}


@pytest.mark.parametrize(
    ("names", "common_name"), [((OURS,), ""), ((SPIFFE,), ""), (("elsewhere.example", OURS), ""), ((), OURS)]
)
async def test_a_listed_name_gets_in_wherever_the_certificate_has_it(toy, authority, names, common_name):
    settings = with_tls(authority.issue(*LOCAL), authority, tls_client_names=f"{OURS}, {SPIFFE}")
    client = authority.credentials(authority.issue(*names, common_name=common_name))
    async with running_server(toy, settings) as address:
        assert await answer(address, client) == b"x"


async def test_another_name_is_denied_every_method_and_counted(toy, authority):
    settings = with_tls(authority.issue(*LOCAL), authority, tls_client_names=OURS)
    ours = authority.credentials(authority.issue(OURS))
    other = authority.credentials(authority.issue("notebook.example", common_name=f"{OURS}.example"))
    labels = {"stage": "text-encoder", "reason": "unknown_peer"}
    async with running_server(toy, settings) as address, neighbor(address, ours):
        before = REGISTRY.get_sample_value("klein_request_rejected_total", labels) or 0
        calls = []
        async with open_channel(address, credentials=other) as channel:
            for shape in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
                calls.append(explain(await failure(call(channel, shape, request=b"denied"))))
            health = health_pb2_grpc.HealthStub(channel)
            calls.append(explain(await failure(health.Check(health_pb2.HealthCheckRequest()))))
        for details in calls:
            assert (details.code, details.reason) == (grpc.StatusCode.PERMISSION_DENIED, "UNKNOWN_PEER")
            assert "notebook.example" in details.message
            assert "KLEIN_TLS_CLIENT_NAMES" in details.message
        assert REGISTRY.get_sample_value("klein_request_rejected_total", labels) == before + len(calls)


async def test_certificates_rotate_under_load_without_a_failed_call(toy, authority):
    served = authority.issue(*LOCAL)
    async with running_server(toy, with_tls(served, authority)) as address:
        client = authority.credentials(authority.issue(OURS))
        async with neighbor(address, client) as has_called_again:
            for days in (2, 3, 4):
                newer = authority.issue(*LOCAL, lifetime=timedelta(days=days))
                loaded = reloads("loaded")
                served.replaced_by(newer)
                await until(lambda loaded=loaded: reloads("loaded") > loaded, 60)
                await has_called_again()
                assert presented(address).split() == newer.certificate.read_text().split()
                assert abs(expiry() - (newer.certificate.stat().st_mtime + days * 86400)) < 60


async def test_a_mounted_secret_is_replaced_by_a_link_to_another_folder(toy, authority, tmp_path):
    first, second = authority.issue(*LOCAL), authority.issue(*LOCAL)
    for name, pair in (("..1", first), ("..2", second)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tls.crt").write_bytes(pair.certificate.read_bytes())
        (tmp_path / name / "tls.key").write_bytes(pair.key.read_bytes())
    data = tmp_path / "..data"
    data.symlink_to("..1")
    mounted = Pair(data / "tls.crt", data / "tls.key")
    async with running_server(toy, with_tls(mounted)) as address:
        refused = reloads("refused")
        (tmp_path / "..new").symlink_to("..2")
        os.replace(tmp_path / "..new", data)
        await until(lambda: presented(address).split() == second.certificate.read_text().split(), 60)
        assert reloads("refused") == refused


async def test_a_broken_rotation_keeps_the_last_good_credentials(toy, authority, stranger, caplog):
    served = authority.issue(*LOCAL)
    good = served.certificate.read_text(), served.key.read_text()
    expired = authority.issue(*LOCAL, lifetime=-timedelta(hours=1))
    broken = {
        "is the key of another certificate": (good[0], stranger.issue(*LOCAL).key.read_text()),
        "holds no certificate": ("half a cert", good[1]),
        "expired at": (expired.certificate.read_text(), expired.key.read_text()),
        "holds no private key": (good[0], ""),
    }
    async with (
        running_server(toy, with_tls(served)) as address,
        neighbor(address, authority.credentials()) as has_called_again,
    ):
        until_then = expiry()
        for why, (certificate, key) in broken.items():
            before = reloads("refused")
            served.key.write_text(key)
            served.certificate.write_text(certificate)
            await until(lambda why=why: any(why in record.message for record in caplog.records), 60)
            await has_called_again()
            # Counted a moment after the line.
            await until(lambda before=before: reloads("refused") > before)
            assert presented(address).split() == good[0].split()
        served.key.unlink()
        await until(lambda: any("cannot be read" in record.message for record in caplog.records), 60)
        refused = reloads("refused")
        await asyncio.sleep(0.5)
        assert reloads("refused") == refused, "a broken state is judged once"
        assert expiry() == until_then
        newer = authority.issue(*LOCAL)
        served.replaced_by(newer)
        await until(lambda: presented(address).split() == newer.certificate.read_text().split(), 60)


async def test_the_authority_of_clients_rotates_too(toy, authority, stranger, tmp_path):
    trusted = Authority(tmp_path, "trusted")
    settings = with_tls(authority.issue(*LOCAL), trusted)
    old = replace(trusted.credentials(trusted.issue(OURS)), authorities=authority.file.read_bytes())
    new = replace(stranger.credentials(stranger.issue(OURS)), authorities=authority.file.read_bytes())
    async with running_server(toy, settings) as address:
        assert await answer(address, old) == b"x"
        await failure(answer(address, new))
        both = trusted.file.read_bytes() + stranger.file.read_bytes()
        for contents, gets_in, stays_out in (
            (both, (old, new), ()),
            (stranger.file.read_bytes(), (new,), (old,)),
        ):
            loaded = reloads("loaded")
            trusted.file.write_bytes(contents)
            await until(lambda loaded=loaded: reloads("loaded") > loaded, 60)
            for client in gets_in:
                assert await answer(address, client) == b"x"
            for client in stays_out:
                await failure(answer(address, client))


async def test_the_health_port_is_plaintext_and_has_nothing_else(toy, authority, free_port):
    settings = with_tls(authority.issue(*LOCAL), authority, health_port=free_port, host="127.0.0.1")
    server = Server(settings, toy)
    try:
        await server.start()
        async with open_channel(f"127.0.0.1:{free_port}") as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            loading = await check(health_pb2.HealthCheckRequest(service=TEXT_ENCODER))
            assert loading.status == health_pb2.HealthCheckResponse.NOT_SERVING
            await server.load()
            for service in ("", TEXT_ENCODER):
                reply = await check(health_pb2.HealthCheckRequest(service=service))
                assert reply.status == health_pb2.HealthCheckResponse.SERVING
            assert (await failure(call(channel, "unary_unary"))).code() is grpc.StatusCode.UNIMPLEMENTED
            too_long = health_pb2.HealthCheckRequest(service="x" * 2000)
            assert (await failure(check(too_long))).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await server.drain()
    finally:
        await server.abandon()
        await toy.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tls_key": ""}, "KLEIN_TLS_CERTIFICATE is set without KLEIN_TLS_KEY"),
        ({"tls_certificate": ""}, "KLEIN_TLS_KEY is set without KLEIN_TLS_CERTIFICATE"),
        ({"tls_key": "/nowhere"}, "KLEIN_TLS_KEY: /nowhere cannot be read: No such file"),
        ({"tls_client_ca": "/dev/null"}, "KLEIN_TLS_CLIENT_CA: /dev/null holds no certificate in PEM format"),
        ({"tls_certificate": "/dev/zero"}, "has more than 1048576 bytes"),
        ({"tls_client_names": "a"}, "KLEIN_TLS_CLIENT_NAMES is set without KLEIN_TLS_CLIENT_CA"),
    ],
)
async def test_settings_that_would_leave_a_door_open_stop_the_start(toy, authority, caplog, changes, message):
    settings = replace(with_tls(authority.issue(*LOCAL)), host="127.0.0.1", **changes)
    assert any(message in problem for problem in settings.problems())
    assert await serve(settings, toy) == 1
    assert message in caplog.text


async def test_authorities_without_a_certificate_stop_the_start(toy, authority):
    settings = replace(QUICK, tls_client_ca=str(authority.file))
    assert any("in plaintext no client can be checked" in problem for problem in settings.problems())


@pytest.mark.parametrize(("options", "message"), [
    ({"password": b"secret"}, "is encrypted"),
    ({"lifetime": timedelta(hours=-1)}, "expired at"),
])  # fmt: skip
async def test_a_pair_that_no_client_could_use_stops_the_start(authority, options, message):
    (problem,) = with_tls(authority.issue(*LOCAL, **options)).problems()
    assert message in problem


@pytest.mark.parametrize(
    ("host", "locks", "warning"),
    [
        ("0.0.0.0", (), "in plaintext and without credentials: set KLEIN_TLS_CERTIFICATE"),
        ("0.0.0.0", ("tls_certificate", "tls_key"), "set KLEIN_TLS_CLIENT_CA to admit only known clients"),
        ("0.0.0.0", ("tls_certificate", "tls_key", "tls_client_ca"), None),
        ("127.0.0.1", (), None),
    ],
)
async def test_an_open_door_is_logged_once_with_what_to_do(toy, authority, caplog, host, locks, warning):
    every = with_tls(authority.issue(*LOCAL), authority)
    settings = replace(QUICK, host=host, **{name: getattr(every, name) for name in locks})
    server = Server(settings, toy)
    with caplog.at_level(logging.WARNING, "klein.server"):
        try:
            await server.start()
        finally:
            await server.abandon()
            await toy.close()
    warnings = [record.message for record in caplog.records if record.name == "klein.server"]
    assert len(warnings) == (1 if warning else 0)
    assert not warning or warning in warnings[0]
