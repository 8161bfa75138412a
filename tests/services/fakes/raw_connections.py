"""Connections of clients that misbehave: idle, half-open, or slow, written byte by byte."""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, GOAWAY, CONTINUATION = 0x0, 0x1, 0x4, 0x7, 0x9
_OPENING_AT_ONCE = 64


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """Returns an HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


@dataclass
class RawConnection:
    """A TCP or TLS connection, without any client's logic."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def begin_http2(self) -> None:
        """Sends the preface and settings, and reads the begin of the server's."""
        self.writer.write(PREFACE + frame(SETTINGS))
        await self.reader.readexactly(9)

    async def is_closed(self, timeout_seconds: float = 60.0) -> bool:
        """Returns whether the server closes the connection in time; what it still sends is dropped."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while await self.reader.read(4096):
                    pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True


@asynccontextmanager
async def raw_connections(
    address: str, count: int, context: ssl.SSLContext | None = None, *, begin: bool = False
) -> AsyncIterator[list[RawConnection]]:
    """Opens connections; with a context, each makes its TLS handshake, and with `begin` begins HTTP/2."""
    host, _, port = address.rpartition(":")
    opened: list[RawConnection] = []
    slots = asyncio.Semaphore(_OPENING_AT_ONCE)

    async def open_one() -> None:
        async with slots:
            streams = await asyncio.open_connection(
                host, int(port), ssl=context, server_hostname="localhost" if context else None, limit=4096
            )
            connection = RawConnection(*streams)
            opened.append(connection)
            if begin:
                await connection.begin_http2()

    try:
        await asyncio.gather(*(open_one() for _ in range(count)))
        yield opened
    finally:
        for connection in opened:
            connection.writer.transport.abort()
        await asyncio.gather(
            *(connection.writer.wait_closed() for connection in opened), return_exceptions=True
        )


def client_context(authority: str) -> ssl.SSLContext:
    """Returns what a raw client that speaks HTTP/2 and trusts an authority's file connects with."""
    context = ssl.create_default_context(cafile=authority)
    context.set_alpn_protocols(["h2"])
    return context
