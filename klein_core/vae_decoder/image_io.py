"""Image input and output: encodes pixels to PNG, JPEG, WebP or raw RGB; decodes and fits reference images."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
from torch import Tensor

from klein_core.errors import InvalidInput, Violation
from klein_core.image_format import (
    DIGITAL_SOURCE_TYPE,
    SOFTWARE,
    format_size_violations,
    format_violations,
    metadata_violations,
)
from klein_core.params import SIZE_MULTIPLE_PX

MODEL_PIXEL_COUNT = 1024 * 1024
"""Larger references are scaled down to this area, klein's rule; smaller ones are never scaled up."""
DEFAULT_QUALITY = 95
"""Of JPEG and WebP."""
# Measured: 5 times (PNG) and 3 times (WebP) as fast as the defaults, for slightly larger files.
_PNG_LEVEL = 1
_WEBP_METHOD = 0
_XMP_KEYWORD = "XML:com.adobe.xmp"
"""Keyword of the PNG text chunk that holds XMP."""
_XMP_MODEL_CHARACTERS = 512
_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" {attributes}/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)
_USER_COMMENT_IS_ASCII = b"ASCII\0\0\0"
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_RGB_CONVERTIBLE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")


def to_rgb_bytes(image: Tensor) -> Tensor:
    """Converts a decoded image (3, H, W) in −1…1 to uint8 (H, W, 3), on the CPU.

    Scales in the image's dtype, then rounds in fp32, as in diffusers' `VaeImageProcessor`; truncating instead would
    make half of all pixels one level darker.
    """
    unit = (image * 0.5 + 0.5).clamp(0, 1)
    return (unit.permute(1, 2, 0).float() * 255).round().to(torch.uint8).cpu().contiguous()


def encode_image(
    rgb: Tensor, image_format: str, quality: int | None = None, metadata: Mapping[str, str] | None = None
) -> bytes:
    """Encodes uint8 pixels (H, W, 3).

    Args:
        rgb: on the CPU.
        image_format: one of `klein_core.image_format.IMAGE_FORMATS`; `raw` is the pixels themselves, row-major.
        quality: of JPEG and WebP, 1 to 100, 95 if `None`; must be `None` for the others.
        metadata: texts to store in the file: as PNG text chunks, or in EXIF as JSON (`UserComment`), where
            `Software` is a separate tag as well. `DigitalSourceType` is in XMP, too. Raw pixels cannot store metadata,
            which is then ignored.

    Raises:
        InvalidInput: the format is unknown, the quality is out of range or given for a lossless format, a side is
            above the format's limit, or the metadata is too large.
    """
    height_px, width_px, _ = rgb.shape
    check_encoding(width_px, height_px, image_format, quality, metadata)
    pixels = rgb.contiguous().numpy()
    if image_format == "raw":
        return pixels.tobytes()
    file = BytesIO()
    # Sorted by key: protobuf maps are unordered, and equal requests must give equal bytes.
    ordered = dict(sorted((metadata or {}).items()))
    Image.fromarray(pixels).save(file, **_save_options(image_format, quality, ordered))
    return file.getvalue()


def check_encoding(
    width_px: int, height_px: int, image_format: str, quality: int | None, metadata: Mapping[str, str] | None
) -> None:
    """Raises what `encode_image` would raise for an image of this size, before the image is computed."""
    violations = list(format_violations(image_format, quality))
    violations += format_size_violations(image_format, width_px, height_px)
    violations += metadata_violations(metadata or {})
    if violations:
        raise InvalidInput(violations)


def _save_options(image_format: str, quality: int | None, metadata: Mapping[str, str]) -> dict[str, Any]:
    if image_format == "png":
        text = PngImagePlugin.PngInfo()
        for key, value in metadata.items():
            text.add_itxt(key, value)
        if DIGITAL_SOURCE_TYPE in metadata:
            text.add_itxt(_XMP_KEYWORD, _xmp(metadata))
        return {"format": "PNG", "compress_level": _PNG_LEVEL, "pnginfo": text}
    options: dict[str, Any] = {"quality": DEFAULT_QUALITY if quality is None else quality}
    if metadata:
        exif = Image.Exif()
        if SOFTWARE in metadata:
            exif[ExifTags.Base.Software] = metadata[SOFTWARE]
        comment = _USER_COMMENT_IS_ASCII + json.dumps(dict(metadata)).encode("ascii")
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
        options["exif"] = exif
    if DIGITAL_SOURCE_TYPE in metadata:
        options["xmp"] = _xmp(metadata).encode()
    if image_format == "jpeg":
        # No chroma subsampling, as in the samples that the model's authors publish.
        return {"format": "JPEG", "subsampling": 0, **options}
    return {"format": "WEBP", "method": _WEBP_METHOD, **options}


def _xmp(metadata: Mapping[str, str]) -> str:
    """Returns the XMP packet that declares an image as made by a model, in IPTC's properties."""
    attributes = {"Iptc4xmpExt:DigitalSourceType": metadata[DIGITAL_SOURCE_TYPE]}
    if "model" in metadata:
        # A JPEG holds no more than 64 KiB of XMP, in one piece.
        attributes["Iptc4xmpExt:AISystemUsed"] = metadata["model"][:_XMP_MODEL_CHARACTERS]
    text = " ".join(f"{name}={quoteattr(value)}" for name, value in attributes.items())
    return _XMP.format(attributes=text)


@dataclass(frozen=True)
class ReferenceLimits:
    """Limits of a reference file."""

    byte_count: int = 20 * 1024 * 1024
    """Largest file, in bytes."""
    pixel_count: int = 64 * 1024 * 1024
    """Most pixels of the image, which bounds the memory that decoding takes."""
    side_px: int = 64
    """Smallest width and height."""
    aspect_ratio: int = 8
    """Largest ratio of the longest side to the shortest."""


DEFAULT_REFERENCE_LIMITS = ReferenceLimits()


def prepare_reference(
    data: bytes, *, field: str = "reference", limits: ReferenceLimits = DEFAULT_REFERENCE_LIMITS
) -> Image.Image:
    """Decodes one reference and fits it to klein: an RGB image, at most 1 megapixel, sides multiples of 16.

    Args:
        data: the file's bytes.
        field: the file's name in errors, for example `references[1]`.
        limits: checked on the file's header, before any pixel is decoded.

    Raises:
        InvalidInput: the file is not an image, is damaged, or exceeds the limits.
    """
    return fit_reference(decode_rgb(open_image(data, field=field, limits=limits), field))


def open_image(data: bytes, *, field: str, limits: ReferenceLimits = DEFAULT_REFERENCE_LIMITS) -> Image.Image:
    """Opens an image file and checks its header; decodes no pixels. Arguments and errors as `prepare_reference`."""
    if len(data) > limits.byte_count:
        raise InvalidInput.of(field, f"is {len(data)} bytes; at most {limits.byte_count} are allowed")
    image = _open(data, field, limits)
    violations = list(_size_violations(image, field, limits))
    if violations:
        raise InvalidInput(violations)
    return image


def scale_to_area(image: Image.Image, pixel_count: int = MODEL_PIXEL_COUNT) -> Image.Image:
    """Scales an image down to `pixel_count` pixels if it has more; never up."""
    if image.width * image.height <= pixel_count:
        return image
    scale = math.sqrt(pixel_count / (image.width * image.height))
    return image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.LANCZOS)


def fit_reference(image: Image.Image) -> Image.Image:
    """Scales an image down to klein's area if it is larger, then crops its sides to multiples of 16."""
    image = scale_to_area(image)
    width = image.width - image.width % SIZE_MULTIPLE_PX
    height = image.height - image.height % SIZE_MULTIPLE_PX
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _open(data: bytes, field: str, limits: ReferenceLimits) -> Image.Image:
    """Opens an image file; reads its header only."""
    try:
        return Image.open(BytesIO(data), formats=_FORMATS)
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        # Pillow's own limit is above all that `ReferenceLimits` allow, and its text names neither of them.
        raise InvalidInput.of(
            field, f"has too many pixels; at most {limits.pixel_count} in all are allowed"
        ) from None
    # Decoders raise almost any exception on malformed bytes.
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


def decode_rgb(image: Image.Image, field: str) -> Image.Image:
    """Decodes the pixels, applies the EXIF orientation and converts to RGB."""
    try:
        image.load()
        # In place, and converted only where it must be: a copy of the largest image takes 256 MiB.
        ImageOps.exif_transpose(image, in_place=True)
        upright = image
        if upright.mode in _SIXTEEN_BIT_MODES:
            # Scaled to 8 bits here: Pillow's own conversion clips at 255, which leaves white.
            gray = ((np.asarray(upright).astype(np.uint32) + 128) // 257).astype(np.uint8)
            return Image.fromarray(gray).convert("RGB")
        if upright.mode == "RGB":
            return upright
        if upright.mode in _RGB_CONVERTIBLE_MODES:
            return upright.convert("RGB")
    except MemoryError:
        raise
    # Decoders raise almost any exception on malformed bytes.
    except Exception as error:
        raise InvalidInput.of(field, f"is a damaged or truncated {image.format} image: {error}") from None
    raise InvalidInput.of(field, f"has pixels of mode {upright.mode}, which cannot be converted to RGB")
