"""Ports of this machine: the public one, and those that nothing listens on."""

from __future__ import annotations

import errno
import socket
from contextlib import ExitStack

from klein_services.cli.errors import CliError
from klein_services.cli.exit_codes import MISUSED

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 50050
"""Of the public API."""


def free_ports(count: int, host: str = LOOPBACK) -> list[int]:
    """Finds `count` different free ports."""
    with ExitStack() as held:
        sockets = [held.enter_context(_bound(host, 0)) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def is_free(port: int, host: str = LOOPBACK) -> bool:
    """Whether a server could listen on `port` of `host`."""
    try:
        _bound(host, port).close()
    except OSError:
        return False
    return True


def require_free(port: int, host: str) -> None:
    """Raises CliError when no server could listen on `port` of `host`."""
    try:
        _bound(host, port).close()
    except OSError as error:
        raise _refusal(port, host, error) from error


def _refusal(port: int, host: str, error: OSError) -> CliError:
    if error.errno == errno.EADDRINUSE:
        return CliError(
            f"Port {port} of {host} is taken.",
            "Is the suite running already? `klein status` tells. --port 0 takes any free port.",
            MISUSED,
        )
    return CliError(
        f"Nothing can listen on port {port} of {host}: {error.strerror}.",
        "--host takes an address of this machine, --port any that is free from 1024 on.",
        MISUSED,
    )


def _bound(host: str, port: int) -> socket.socket:
    # Without SO_REUSEPORT: gRPC servers set it, so two suites would else share a port without a word.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    each = socket.socket(family, socket.SOCK_STREAM)
    try:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        each.bind((host.strip("[]"), port))
    except OSError:
        each.close()
        raise
    return each
