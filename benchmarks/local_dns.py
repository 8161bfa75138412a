"""Local DNS server for names with several addresses, like a headless Service: dnsmasq on a port of loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

READY_SECONDS = 10.0
_QUERY_NAME = b"\x05ready\x05klein\x04test\x00"
_QUERY = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00" + _QUERY_NAME + b"\x00\x01\x00\x01"


class LocalDns:
    """A running DNS server whose names can change."""

    def __init__(self, process: subprocess.Popen[bytes], hosts: Path, port: int) -> None:
        self.port = port
        self._process = process
        self._hosts = hosts

    def target(self, name: str, port: int) -> str:
        """Returns the gRPC target of all addresses of a name."""
        return f"dns://127.0.0.1:{self.port}/{name}:{port}"

    def publish(self, addresses: Mapping[str, list[str]]) -> None:
        """Replaces all names."""
        _write(self._hosts, addresses)
        self._process.send_signal(signal.SIGHUP)


@contextmanager
def local_dns(dnsmasq: str, folder: Path) -> Iterator[LocalDns]:
    """Runs dnsmasq without other name servers; yields it once it answers.

    Args:
        dnsmasq: path of the program.
        folder: where the file of hosts is written.

    Raises:
        RuntimeError: it does not answer in time.
    """
    port, hosts = free_port(), folder / "hosts"
    _write(hosts, {})
    arguments = [
        dnsmasq, "--keep-in-foreground", f"--port={port}", "--listen-address=127.0.0.1", "--bind-interfaces",
        "--conf-file=/dev/null", "--pid-file=", "--no-resolv", "--no-hosts", f"--addn-hosts={hosts}",
        "--local=/klein.test/", "--local-ttl=0", "--log-facility=-",
    ]  # fmt: skip
    if os.geteuid() == 0:
        # Otherwise it would change to a user that cannot read the folder.
        arguments.append("--user=root")
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_ready(process, port)
        yield LocalDns(process, hosts, port)
    finally:
        process.terminate()
        process.wait(timeout=10)


def free_port() -> int:
    """Returns a port that is free on every address now."""
    with socket.create_server(("0.0.0.0", 0)) as listener:
        return int(listener.getsockname()[1])


def _write(hosts: Path, addresses: Mapping[str, list[str]]) -> None:
    lines = ["127.0.0.1 ready.klein.test"]
    lines += [f"{address} {name}" for name, each in addresses.items() for address in each]
    # Renamed into place, so that dnsmasq never reads half a file.
    partial = hosts.with_suffix(".new")
    partial.write_text("\n".join(lines) + "\n")
    partial.replace(hosts)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + READY_SECONDS
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(0.2)
        while time.monotonic() < end and process.poll() is None:
            client.sendto(_QUERY, ("127.0.0.1", port))
            try:
                client.recv(512)
            except OSError:
                time.sleep(0.05)
                continue
            return
    raise RuntimeError("dnsmasq does not answer")
