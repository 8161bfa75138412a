"""Reserved ports, hosts of the public API, and what a suite refuses before it starts."""

import socket
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import grpc
import pytest

from klein_services.cli.errors import CliError
from klein_services.cli.ports import ReservedPort, reserve_all_or_free, reserve_public
from klein_services.cli.suite import Suite, SuiteOptions

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems hold no bound port")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("::1", "[::1]"),
        ("[::1]", "[::1]"),
        ("::", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("localhost", "localhost"),
    ],
)
def test_a_suite_shows_where_it_is_reached(host: str, expected: str, tmp_path: Path) -> None:
    suite = Suite(SuiteOptions(host=host, log_folder=tmp_path))
    suite.stop()
    assert suite.target == f"{expected}:{suite.ports['orchestrator']}"


def test_a_taken_port_is_distinguished_from_a_bad_host() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(CliError, match=f"--port {port} of 127.0.0.1 is taken"):
            reserve_public(port, "127.0.0.1")
    with pytest.raises(CliError, match=r"port 0 of nowhere\.invalid: .*[Nn]ame") as caught:
        reserve_public(0, "nowhere.invalid")
    assert "taken" not in str(caught.value)


async def serve_on(port: int) -> None:
    """Listens as stages do, and answers."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    assert server.add_insecure_port(f"127.0.0.1:{port}") == port
    await server.start()
    with closing(socket.create_connection(("127.0.0.1", port), timeout=30)):
        pass
    await server.stop(0)


@only_linux
async def test_a_reserved_port_is_a_server_s_again_and_again_and_no_other_reservation_s() -> None:
    with ReservedPort() as reserved:
        for _ in range(2):
            await serve_on(reserved.port)
        others = [ReservedPort() for _ in range(50)]
        assert reserved.port not in {other.port for other in others}
        for other in others:
            other.release()


@only_linux
async def test_a_port_that_is_given_has_one_reservation() -> None:
    with ReservedPort() as free:
        port = free.port
    with ReservedPort(port):
        with pytest.raises(OSError, match="in use"):
            ReservedPort(port)
        await serve_on(port)
        taken = reserve_all_or_free([port])
        assert [each.port for each in taken] != [port]
        for each in taken:
            each.release()
    with ReservedPort(port) as again:
        assert again.port == port


def test_logs_need_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CliError, match=r"--log-folder .*file cannot be made: File exists") as caught:
        Suite(SuiteOptions(log_folder=tmp_path / "file"))
    assert caught.value.exit_code == 2
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    with pytest.raises(CliError, match=r"need a folder for temporary files: .*TMPDIR") as caught:
        Suite(SuiteOptions())
    assert caught.value.exit_code == 2


def test_an_unknown_variant_names_its_flag() -> None:
    with pytest.raises(CliError, match=r"--variant: 'klein-5b' is no known variant; .*klein-9b\?$") as caught:
        Suite(SuiteOptions(variant="klein-5b"))
    assert caught.value.exit_code == 2


def test_a_question_ends_in_one_mark(tmp_path: Path) -> None:
    with pytest.raises(CliError, match=r"part of a diffusers folder\?") as caught:
        Suite(SuiteOptions(model=str(tmp_path)))
    assert caught.value.sentence.endswith("folder?")
