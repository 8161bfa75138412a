"""HTTP/2 frames written by hand, for what no gRPC client sends."""

from __future__ import annotations

import socket
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS = 0, 1, 3, 4
END_STREAM, END_HEADERS = 1, 4
CANCEL = 8


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Returns one frame."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def request_headers(path: str, authority: str) -> bytes:
    """Returns the header block of a gRPC request, without compression."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": authority,
        "content-type": "application/grpc",
        "te": "trailers",  # codespell:ignore te
    }
    parts = [part.encode() for item in fields.items() for part in item]
    literals = [bytes((len(part),)) + part for part in parts]
    return b"".join(b"\0" + name + value for name, value in zip(literals[::2], literals[1::2], strict=True))


def connect(address: str) -> socket.socket:
    """Returns a connection that has sent its settings."""
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(PREFACE + frame(SETTINGS, 0, 0))
    return connection


def begun_and_reset(path: str, address: str, count: int, first_stream: int = 1) -> bytes:
    """Returns the frames of `count` whole requests, followed by the reset of each."""
    block = request_headers(path, address)
    streams = range(first_stream, first_stream + 2 * count, 2)
    requests = [
        frame(HEADERS, END_HEADERS, stream, block) + frame(DATA, END_STREAM, stream, b"\0\0\0\0\0")
        for stream in streams
    ]
    resets = [frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL)) for stream in streams]
    return b"".join(requests + resets)
