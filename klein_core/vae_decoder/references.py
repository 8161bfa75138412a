"""Bytes of a reference image, from anyone, to the RGB image that the autoencoder reads.

Follows diffusers' klein pipeline on an image opened with its `load_image`: the EXIF orientation is applied,
alpha is dropped, colour profiles are ignored, and of an animation the first frame counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps

from klein_core.errors import InvalidInput, Violation

MODEL_PIXEL_COUNT = 1024 * 1024
"""Larger references are scaled down to this area, klein's own rule; smaller ones are never scaled up."""
SIZE_MULTIPLE_PX = 16
"""Sides are floored to multiples of this, by cropping around the centre."""

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_RGB_CONVERTIBLE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")


@dataclass(frozen=True)
class ReferenceLimits:
    """What a reference file may be."""

    byte_count: int = 20 * 1024 * 1024
    """Bytes of the file."""
    pixel_count: int = 64 * 1024 * 1024
    """Pixels of the image in the file, which bounds the memory that decoding takes."""
    side_px: int = 64
    """Smallest width and height."""
    aspect_ratio: int = 8
    """Longest side over the shortest."""


DEFAULT_REFERENCE_LIMITS = ReferenceLimits()


def prepare_reference(
    data: bytes, *, field: str = "reference", limits: ReferenceLimits = DEFAULT_REFERENCE_LIMITS
) -> Image.Image:
    """Decodes and fits one reference: an RGB image whose sides are multiples of 16, about 1 MP at most.

    Args:
        data: the file as it came.
        field: the caller's name for it in errors, for example `references[1]`.
        limits: checked on the file's header, before any pixel is decoded.

    Raises:
        InvalidInput: it is not an image, is damaged, or is outside the limits.
    """
    if len(data) > limits.byte_count:
        raise InvalidInput.of(field, f"is {len(data)} bytes; at most {limits.byte_count} are allowed")
    image = _open(data, field)
    violations = list(_size_violations(image, field, limits))
    if violations:
        raise InvalidInput(violations)
    return fit_reference(_decode(image, field))


def fit_reference(image: Image.Image) -> Image.Image:
    """Scales an image down to klein's area where it is larger, then crops its sides to multiples of 16."""
    if image.width * image.height > MODEL_PIXEL_COUNT:
        scale = math.sqrt(MODEL_PIXEL_COUNT / (image.width * image.height))
        size = int(image.width * scale), int(image.height * scale)
        image = image.resize(size, Image.Resampling.LANCZOS)
    width = image.width - image.width % SIZE_MULTIPLE_PX
    height = image.height - image.height % SIZE_MULTIPLE_PX
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _open(data: bytes, field: str) -> Image.Image:
    """Reads the header only."""
    try:
        return Image.open(BytesIO(data), formats=_FORMATS)
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidInput.of(field, f"has too many pixels: {error}") from None
    # Decoders raise nearly anything on malformed bytes.
    except Exception:
        raise InvalidInput.of(field, f"is not an image; it must be one of {', '.join(_FORMATS)}") from None


def _size_violations(image: Image.Image, field: str, limits: ReferenceLimits) -> Iterator[Violation]:
    size = f"is {image.width}×{image.height} pixels"
    longest, shortest = max(image.size), min(image.size)
    if image.width * image.height > limits.pixel_count:
        yield Violation(field, f"{size}; at most {limits.pixel_count} in all are allowed")
    if shortest < limits.side_px:
        yield Violation(field, f"{size}; each side must be at least {limits.side_px}")
    if longest > limits.aspect_ratio * shortest:
        yield Violation(field, f"{size}; one side may be at most {limits.aspect_ratio} times the other")


def _decode(image: Image.Image, field: str) -> Image.Image:
    """Decodes the pixels, turns them upright and makes them RGB."""
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.mode in _SIXTEEN_BIT_MODES:
            return _eight_bit(upright).convert("RGB")
        if upright.mode in _RGB_CONVERTIBLE_MODES:
            return upright.convert("RGB")
    except MemoryError:
        raise
    # Decoders raise nearly anything on malformed bytes.
    except Exception as error:
        raise InvalidInput.of(field, f"is a damaged or truncated {image.format} image: {error}") from None
    raise InvalidInput.of(field, f"has pixels of mode {upright.mode}, which cannot be made RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey to 8 bits; Pillow's own conversion clips at 255, which leaves white."""
    return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
