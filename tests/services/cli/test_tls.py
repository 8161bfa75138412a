"""TLS of the commands that call a suite: each failed handshake is one sentence with the flag to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import grpc
import pytest

from klein_api.v1 import image_service_pb2 as api
from klein_services.cli.main import main
from tests.services.fakes.answering_orchestrator import Orchestrator, serving
from tests.services.fakes.certificates import Authority, Pair

Status = Callable[..., tuple[int, str]]


@pytest.fixture
def status(capfd: pytest.CaptureFixture[str]) -> Status:
    def run(*arguments: object) -> tuple[int, str]:
        try:
            exit_code = main(["status", *(str(argument) for argument in arguments)])
        except SystemExit as end:
            exit_code = int(end.code or 0)
        printed = capfd.readouterr()
        return exit_code, printed.out + printed.err

    return run


@pytest.fixture
def orchestrator() -> Orchestrator:
    orchestrator = Orchestrator()
    orchestrator.models = api.ListModelsResponse(models=[api.RoutedModel(name="pico", serving=True)])
    return orchestrator


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def of_server(pair: Pair, clients: Authority | None = None) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials(
        [(pair.key.read_bytes(), pair.certificate.read_bytes())],
        clients.file.read_bytes() if clients else None,
        clients is not None,
    )


@pytest.fixture
def tls_target(orchestrator: Orchestrator, authority: Authority) -> Iterator[str]:
    with serving(orchestrator, of_server(authority.issue("127.0.0.1"))) as address:
        yield address


@pytest.fixture
def mutual_target(orchestrator: Orchestrator, authority: Authority) -> Iterator[str]:
    with serving(orchestrator, of_server(authority.issue("127.0.0.1"), authority)) as address:
        yield address


def test_flags_call_a_server_with_tls(status: Status, tls_target: str, authority: Authority) -> None:
    for prefix in ("", "grpcs://", "https://"):
        assert status("--target", f"{prefix}{tls_target}", "--tls-ca", authority.file)[0] == 0


def test_variables_call_a_server_with_mutual_tls(
    status: Status, mutual_target: str, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = authority.issue("client.example")
    monkeypatch.setenv("KLEIN_TARGET", mutual_target)
    monkeypatch.setenv("KLEIN_TARGET_TLS_CA", str(authority.file))
    monkeypatch.setenv("KLEIN_TARGET_TLS_CERTIFICATE", str(own.certificate))
    monkeypatch.setenv("KLEIN_TARGET_TLS_KEY", str(own.key))
    assert status()[0] == 0


def test_a_name_of_the_certificate_may_replace_the_host(
    status: Status, orchestrator: Orchestrator, authority: Authority
) -> None:
    with serving(orchestrator, of_server(authority.issue("server.example"))) as target:
        flags = ("--target", target, "--tls-ca", authority.file)
        exit_code, text = status(*flags)
        assert exit_code == 1
        assert "for another name" in text
        assert "--tls-name" in text
        assert status(*flags, "--tls-name", "server.example")[0] == 0


def test_an_unknown_authority_is_named(status: Status, tls_target: str, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger")
    exit_code, text = status("--target", tls_target, "--tls-ca", stranger.file)
    assert exit_code == 1
    assert "None of the authorities in --tls-ca issued the certificate" in text
    exit_code, text = status("--target", f"grpcs://{tls_target}")
    assert exit_code == 1
    assert "None of the authorities that are public issued the certificate" in text


def test_an_expired_certificate_is_named(
    status: Status, orchestrator: Orchestrator, authority: Authority
) -> None:
    expired = authority.issue("127.0.0.1", lifetime=-timedelta(hours=1))
    with serving(orchestrator, of_server(expired)) as target:
        exit_code, text = status("--target", target, "--tls-ca", authority.file)
    assert exit_code == 1
    assert "is not valid at this time" in text


def test_plaintext_to_a_port_with_tls_names_the_flag(status: Status, tls_target: str) -> None:
    exit_code, text = status("--target", tls_target)
    assert exit_code == 1
    assert "it may require TLS" in text
    assert "--tls-ca" in text


def test_tls_to_a_plaintext_port_names_the_flag(
    status: Status, orchestrator: Orchestrator, authority: Authority
) -> None:
    with serving(orchestrator) as target:
        exit_code, text = status("--target", target, "--tls-ca", authority.file)
    assert exit_code == 1
    assert "does not speak TLS" in text


def test_a_refused_certificate_and_a_missing_one_differ(
    status: Status, mutual_target: str, authority: Authority, tmp_path: Path
) -> None:
    flags = ("--target", mutual_target, "--tls-ca", authority.file)
    exit_code, text = status(*flags)
    assert exit_code == 1
    assert "it may require a certificate" in text
    own = Authority(tmp_path, "stranger").issue("client.example")
    exit_code, text = status(*flags, "--tls-certificate", own.certificate, "--tls-key", own.key)
    assert exit_code == 1
    assert "does not accept the certificate in --tls-certificate" in text


def test_nothing_at_the_address_stays_nothing(status: Status, authority: Authority) -> None:
    _, text = status("--target", "127.0.0.1:1", "--tls-ca", authority.file)
    assert "Nothing answers at 127.0.0.1:1" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tls-ca", "/nowhere"), "--tls-ca: /nowhere cannot be read"),
        (("--tls-certificate", "/dev/null"), "--tls-certificate is set without --tls-key"),
        (("--tls-name", "a"), "--tls-name has no use without TLS"),
        (("--target", "http://localhost:50050"), "grpcs://localhost:50050 for TLS"),
        (("--target", "https://localhost:50050/v1"), "is a URL"),
    ],
)
def test_flags_that_cannot_be_used_are_named(status: Status, flags: tuple[str, ...], message: str) -> None:
    exit_code, text = status(*flags)
    assert exit_code == 2
    assert message in text
