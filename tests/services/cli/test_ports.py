"""Hosts and ports of the public API: what can be listened on, and how it is called."""

import socket
from pathlib import Path

import pytest

from klein_services.cli.errors import CliError
from klein_services.cli.ports import require_free
from klein_services.cli.suite import Suite, SuiteOptions


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("::1", "[::1]:5"),
        ("[::1]", "[::1]:5"),
        ("::", "127.0.0.1:5"),
        ("0.0.0.0", "127.0.0.1:5"),
        ("localhost", "localhost:5"),
    ],
)
def test_a_suite_tells_where_it_is_reached(host: str, expected: str, tmp_path: Path) -> None:
    assert Suite(SuiteOptions(host=host, port=5, log_folder=tmp_path)).target == expected


def test_a_taken_port_is_told_from_a_host_that_is_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(CliError, match=f"Port {port} of 127.0.0.1 is taken"):
            require_free(port, "127.0.0.1")
    with pytest.raises(CliError, match=r"port 0 of nowhere\.invalid: .*[Nn]ame") as caught:
        require_free(0, "nowhere.invalid")
    assert "taken" not in str(caught.value)


def test_logs_need_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CliError, match=r"--log-folder .*file cannot be made: File exists") as caught:
        Suite(SuiteOptions(log_folder=tmp_path / "file"))
    assert caught.value.exit_code == 2


def test_a_question_ends_in_one_mark(tmp_path: Path) -> None:
    with pytest.raises(CliError, match=r"part of a diffusers folder\?") as caught:
        Suite(SuiteOptions(model=str(tmp_path)))
    assert caught.value.sentence.endswith("folder?")
