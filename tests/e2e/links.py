"""Links: TCP proxies between processes, which tests let fail as networks do."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from klein_services.cli.ports import LOOPBACK, ReservedPort

_READ_BYTES = 64 << 10
_CUT_BYTES = 2 << 10
"""Least bytes of a piece that is cut: more than calls have in headers, so that it is of a tensor or a file."""
_SLICES_PER_SECOND = 20
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER that makes the kernel send RST in place of FIN."""


@dataclass(frozen=True)
class Condition:
    """State of a link; the default forwards everything at once."""

    delay_seconds: float = 0.0
    """Time that each piece waits, in each direction."""
    bytes_per_second: float = 0.0
    """Bound of each direction of each connection; 0 is none."""
    stalls: bool = False
    """Whether connections are accepted and bytes taken, but nothing goes on."""
    cuts: bool = False
    """Whether connections end in the middle of their next large piece."""
    flip_share: float = 0.0
    """Share of pieces of which one bit is flipped."""
    flip_bytes: int = 1
    """Least bytes of such a piece: pieces of many kilobytes are mostly content of tensors and files."""


CLEAR = Condition()


class Link:
    """Forwards connections to a replica, in the event loop of its network.

    Args:
        address: where the replica listens.
        seed: of the bits that are flipped.
    """

    def __init__(self, address: str, seed: int = 0) -> None:
        host, _, port = address.rpartition(":")
        self._upstream = (host, int(port))
        self._port = ReservedPort()
        self._randomness = random.Random(seed)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.condition = CLEAR
        """May be set from any thread."""
        self.flipped = 0
        """Bits that were flipped."""
        self.cut = 0
        """Connections that were ended in the middle of a piece."""

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self._port.port}"

    async def open(self) -> None:
        """Accepts connections."""
        self._server = await asyncio.start_server(
            self._connected, LOOPBACK, self._port.port, reuse_address=True
        )

    async def refuse(self) -> None:
        """Refuses new connections and ends those there are."""
        if self._server is not None:
            self._server.close()
            self._server = None
        await self.drop()

    async def drop(self) -> None:
        """Resets all connections."""
        for writer in list(self._writers):
            _reset(writer)

    async def close(self) -> None:
        await self.refuse()
        self._port.release()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection(*self._upstream)
        except OSError:
            _reset(writer)
            return
        both = {writer, upstream_writer}
        self._writers |= both
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._forward(reader, upstream_writer))
                group.create_task(self._forward(upstream_reader, writer))
        except* OSError:
            pass  # one side reset the connection; the other one is reset below
        finally:
            self._writers -= both
            for each in both:
                _reset(each)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_READ_BYTES):
            condition = self.condition
            if condition.delay_seconds:
                await asyncio.sleep(condition.delay_seconds)
            while self.condition.stalls:  # noqa: ASYNC110
                await asyncio.sleep(1 / _SLICES_PER_SECOND)
            if condition.cuts and len(data) >= _CUT_BYTES:
                writer.write(data[: len(data) // 2])
                await writer.drain()
                self.cut += 1
                raise ConnectionAbortedError
            is_flipped = self._randomness.random() < condition.flip_share
            if is_flipped and len(data) >= condition.flip_bytes:
                changed = bytearray(data)
                changed[self._randomness.randrange(len(data))] ^= 1 << self._randomness.randrange(8)
                data = bytes(changed)
                self.flipped += 1
            await self._write(data, writer)
        raise ConnectionResetError

    async def _write(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        position = 0
        while position < len(data):
            rate = self.condition.bytes_per_second
            piece = (
                data[position : position + max(1, int(rate / _SLICES_PER_SECOND))]
                if rate
                else data[position:]
            )
            writer.write(piece)
            await writer.drain()
            position += len(piece)
            if rate:
                await asyncio.sleep(len(piece) / rate)


def _reset(writer: asyncio.StreamWriter) -> None:
    connection: socket.socket | None = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


class Network:
    """The links of a fleet and the thread of their event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._links: list[Link] = []

    def link(self, address: str) -> Link:
        """Opens a link to a replica."""
        link = Link(address, seed=len(self._links))
        self._links.append(link)
        self._run(link.open())
        return link

    def drop(self, link: Link) -> None:
        """Resets a link's connections."""
        self._run(link.drop())

    def refuse(self, link: Link) -> None:
        """Makes a link refuse connections until `accept`."""
        self._run(link.refuse())

    def accept(self, link: Link) -> None:
        """Ends `refuse`."""
        self._run(link.open())

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        for link in self._links:
            self._run(link.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, action) -> None:
        asyncio.run_coroutine_threadsafe(action, self._loop).result(timeout=10)


@contextmanager
def running_network() -> Iterator[Network]:
    """Yields a network, and closes its links."""
    with ExitStack() as stack:
        network = Network()
        network.start()
        stack.callback(network.close)
        yield network
