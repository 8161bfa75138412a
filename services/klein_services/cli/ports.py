"""Ports of this machine, reserved for servers that other processes start."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

from klein_services.cli.errors import CliError
from klein_services.cli.exit_codes import MISUSED

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 50050
"""Port of the public API."""
GATEWAY_PORT = 8080
"""Port of the gateway."""
_CAN_HOLD = sys.platform == "linux"


class ReservedPort:
    """A port that a child process can listen on and nothing else takes, until it is released.

    The socket here is bound and never listens. Linux lets a server that sets SO_REUSEADDR, as gRPC's and the
    metrics' do, listen on a port that is only bound, but offers the port to no other bind(0) and no connection. So
    a free port cannot be lost between its choice and a child's start, nor while a child is restarted. The
    alternative, children that bind port 0 and report it, would lose the port at each restart and make the
    orchestrator wait for the ports of its stages. Other systems refuse the second bind, so there the reservation
    ends at once and only the choice of a free port is left.

    Args:
        port: 0 takes a free one.
        host: address to listen on.

    Raises:
        OSError: the port is taken, or this machine has no such address.
    """

    def __init__(self, port: int = 0, host: str = LOOPBACK) -> None:
        with ExitStack() as held:
            if port and _CAN_HOLD:
                # A second socket that is bound with SO_REUSEADDR would be accepted until the first child listens;
                # without SO_REUSEADDR, connections in TIME_WAIT would count as taken. So reservations exclude each
                # other by an abstract Unix address, which the kernel frees with the process.
                claim = held.enter_context(socket.socket(socket.AF_UNIX))
                claim.bind(f"\0klein-port-{port}")
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            # Without SO_REUSEPORT: two suites would share a port at random, without an error.
            bound = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((host.strip("[]"), port))
            self.port: int = bound.getsockname()[1]
            self._held = held.pop_all()
        if not _CAN_HOLD:
            self.release()

    def release(self) -> None:
        """Gives the port back; a server that listens on it goes on."""
        self._held.close()

    def __enter__(self) -> ReservedPort:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def reserve_public(port: int, host: str) -> ReservedPort:
    """Reserves the port of `--port` and `--host`; raises CliError when no server could listen there."""
    try:
        return ReservedPort(port, host)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise CliError(
                f"--port {port} of {host} is taken.",
                "Is the suite running already? `klein status` shows it. --port 0 takes any free port.",
                MISUSED,
            ) from error
        raise CliError(
            f"Nothing can listen on port {port} of {host}: {error.strerror}.",
            "--host takes an address of this machine, --port any that is free from 1024 on.",
            MISUSED,
        ) from error


def reserve_gateway(port: int | None, host: str) -> ReservedPort:
    """Reserves the port of `--gateway-port`; for `None`, `GATEWAY_PORT` or a free one where that is taken.

    Raises:
        CliError: nothing could listen on a port that was asked for.
    """
    try:
        return ReservedPort(GATEWAY_PORT if port is None else port, host)
    except OSError as error:
        if port is None:
            return ReservedPort(0, host)
        raise CliError(
            f"Nothing can listen on --gateway-port {port} of {host}: {error.strerror}.",
            "0 takes any free port, --no-gateway leaves the gateway out.",
            MISUSED,
        ) from error


def reserve_all_or_free(preferred: Sequence[int]) -> list[ReservedPort]:
    """Reserves the preferred ports of this machine, or as many free ones when one of them is taken."""
    try:
        return _reserve_all(preferred)
    except OSError:
        return _reserve_all([0] * len(preferred))


def _reserve_all(ports: Sequence[int]) -> list[ReservedPort]:
    with ExitStack() as held:
        reserved = [held.enter_context(ReservedPort(port)) for port in ports]
        held.pop_all()
    return reserved
