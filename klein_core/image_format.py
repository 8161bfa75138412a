"""Limits of each image format: quality, side lengths, metadata. Torch-free; every front end validates with them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from klein_core.errors import Violation

IMAGE_FORMATS = ("png", "jpeg", "webp", "raw")
LOSSY_FORMATS = ("jpeg", "webp")
SIDE_LIMITS_PX: Mapping[str, int] = MappingProxyType({"jpeg": 65_500, "webp": 16_383})
"""Largest width and height by format. Sources: libjpeg's JPEG_MAX_DIMENSION, libwebp's WEBP_MAX_DIMENSION. The limits
of the other formats are far above any image of a model."""
METADATA_BYTE_LIMIT = 60_000
"""A JPEG's EXIF block is limited to 64 KiB; the other formats use the same limit."""
SOFTWARE = "Software"
"""The metadata key that is also written to an EXIF tag."""
DIGITAL_SOURCE_TYPE = "DigitalSourceType"
"""The metadata key that is also written to XMP, for readers that look for IPTC's property."""
TRAINED_ALGORITHMIC_MEDIA = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's digital source type of an image that a model made."""
COMPOSITE_WITH_TRAINED_ALGORITHMIC_MEDIA = (
    "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
)
"""IPTC's digital source type of an image of which a model made parts."""
DIGITAL_SOURCE_TYPES = (TRAINED_ALGORITHMIC_MEDIA, COMPOSITE_WITH_TRAINED_ALGORITHMIC_MEDIA)

_KEY_LENGTH = 79
"""Longest key of a PNG text chunk."""
_KEYS_NAMED = 8
_SHOWN_CHARACTERS = 64


def format_violations(image_format: str, quality: int | None) -> Iterator[Violation]:
    """Yields the violations of a requested format and quality."""
    if image_format not in IMAGE_FORMATS:
        shown = image_format[:_SHOWN_CHARACTERS]
        yield Violation("format", f"is {shown!r}; must be one of {', '.join(IMAGE_FORMATS)}")
    elif quality is not None and image_format not in LOSSY_FORMATS:
        yield Violation(
            "quality", f"is only supported by {' and '.join(LOSSY_FORMATS)}; leave it out for {image_format}"
        )
    if quality is not None and not 1 <= quality <= 100:
        yield Violation("quality", f"is {quality}; must be in [1, 100]")


def format_size_violations(image_format: str, width_px: int, height_px: int) -> Iterator[Violation]:
    """Yields a violation for each side that exceeds the format's limit: `width_px`, `height_px`."""
    limit = SIDE_LIMITS_PX.get(image_format)
    for name, value in (("width_px", width_px), ("height_px", height_px)):
        if limit is not None and value > limit:
            yield Violation(name, f"is {value}; {image_format} allows at most {limit}: use another format")


def metadata_violations(metadata: Mapping[str, str]) -> Iterator[Violation]:
    """Yields the violations of texts to store in an image file."""
    size = len(json.dumps(dict(metadata))) + len(metadata.get(SOFTWARE, ""))
    if size > METADATA_BYTE_LIMIT:
        yield Violation(
            "metadata",
            f"takes {size} bytes as JSON, {SOFTWARE} counted twice; at most {METADATA_BYTE_LIMIT} are allowed",
        )
    source_type = metadata.get(DIGITAL_SOURCE_TYPE, TRAINED_ALGORITHMIC_MEDIA)
    if source_type not in DIGITAL_SOURCE_TYPES:
        shown = source_type[:_SHOWN_CHARACTERS]
        yield Violation(
            "metadata",
            f"has the {DIGITAL_SOURCE_TYPE} {shown!r}; must be one of {', '.join(DIGITAL_SOURCE_TYPES)}",
        )
    bad = [
        key for key in metadata if not (1 <= len(key) <= _KEY_LENGTH and key.isascii() and key.isprintable())
    ]
    for key in bad[:_KEYS_NAMED]:
        shown = key[:_SHOWN_CHARACTERS]
        yield Violation("metadata", f"has the key {shown!r}; must be 1 to {_KEY_LENGTH} ASCII characters")
