"""Sizes of image files, read from their headers, and the megapixels that a model sees of them."""

from __future__ import annotations

import math

from klein_core.params import DEFAULT_LIMITS, SIZE_MULTIPLE_PX

MODEL_PIXEL_COUNT = 1024 * 1024
"""Pixels of a reference for the model; larger ones are scaled down."""
SMALLEST_SIDE = DEFAULT_LIMITS.side_px
"""Smallest width and height of a reference."""
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of segments with a size; the excepted ones are tables."""
_JPEG_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD9)))


def image_size(data: bytes) -> tuple[int, int] | None:
    """Returns width and height of a PNG, JPEG or WebP file; `None` when its header does not have them."""
    size = None
    if data.startswith(b"\x89PNG\r\n\x1a\n") and data[12:16] == b"IHDR" and len(data) >= 24:
        size = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    elif data.startswith(b"\xff\xd8"):
        size = _jpeg_size(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        size = _webp_size(data)
    return size if size and all(size) else None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Walks over the segments, by their lengths, to the one of the frame."""
    position = 2
    while position + 9 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:
            # Bytes of 0xFF may fill the space before a marker.
            position += 1
        elif marker in _JPEG_WITHOUT_LENGTH:
            position += 2
        elif marker in _JPEG_FRAMES:
            height, width = data[position + 5 : position + 7], data[position + 7 : position + 9]
            return int.from_bytes(width), int.from_bytes(height)
        else:
            position += 2 + max(2, int.from_bytes(data[position + 2 : position + 4]))
    return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    match data[12:16]:
        case b"VP8 ":
            sides = int.from_bytes(data[26:28], "little"), int.from_bytes(data[28:30], "little")
            return sides[0] & 0x3FFF, sides[1] & 0x3FFF
        case b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8X":
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return None


def reference_size(width: int, height: int) -> tuple[int, int]:
    """Returns the size at which a model sees a reference: scaled down to its area, then cropped to multiples of 16."""
    if width * height > MODEL_PIXEL_COUNT:
        scale = math.sqrt(MODEL_PIXEL_COUNT / (width * height))
        width, height = int(width * scale), int(height * scale)
    return width - width % SIZE_MULTIPLE_PX, height - height % SIZE_MULTIPLE_PX
