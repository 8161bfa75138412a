"""Hostile and unusual image files: false sizes in headers, and formats that Pillow does not write."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image

_PNG_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
"""By number of channels: gray, gray with alpha, RGB, RGBA."""


def encoded(image: Image.Image, image_format: str = "PNG", **options) -> bytes:
    file = BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def png_bomb(side: int) -> bytes:
    """A few kilobytes of PNG that claim side × side pixels."""
    return _png(side, side, depth=8, channels=3, rows=b"\0" * 1_000_000)


def webp_bomb(side: int) -> bytes:
    """An animated WebP of small frames on a canvas that claims side × side pixels."""
    first, second = (Image.new("RGB", (64, 64), color) for color in ("red", "blue"))
    data = bytearray(encoded(first, "WEBP", save_all=True, append_images=[second]))
    canvas = data.index(b"VP8X") + 12
    data[canvas : canvas + 6] = (side - 1).to_bytes(3, "little") * 2
    return bytes(data)


def sixteen_bit_png(pixels: np.ndarray) -> bytes:
    """A PNG of (height, width, channels) values below 65536."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(">u2"))
    return _png(width, height, depth=16, channels=channels, rows=rows)


def _png(width: int, height: int, *, depth: int, channels: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, _PNG_COLOR_TYPES[channels], 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts
