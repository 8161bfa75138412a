"""Validation and reading of the two streamed requests, EncodeReference and DecodeLatents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from klein_api.v1 import image_pb2
from klein_api.v1 import vae_decoder_service_pb2 as pb
from klein_core.errors import InvalidInput
from klein_core.image_format import format_size_violations, format_violations, metadata_violations
from klein_core.params import SIZE_MULTIPLE_PX, Limits, size_violations
from klein_services.runtime.frames import MAX_FRAME_BYTES, FrameReader, shown_shape
from klein_services.runtime.request_parts import RequestParts
from klein_services.runtime.stage import require_model
from klein_services.runtime.tensors import frames_tensor

MAX_FIELD_NAME_CHARACTERS = 64
_LARGEST_ELEMENT_BYTES = 4
_FORMATS = {
    image_pb2.IMAGE_FORMAT_UNSPECIFIED: "png",
    image_pb2.IMAGE_FORMAT_PNG: "png",
    image_pb2.IMAGE_FORMAT_JPEG: "jpeg",
    image_pb2.IMAGE_FORMAT_WEBP: "webp",
    image_pb2.IMAGE_FORMAT_RAW_RGB: "raw",
}
_NUMBERS = {name: number for number, name in _FORMATS.items()}


@dataclass(frozen=True)
class Encoding:
    """File format of the decoded image."""

    name: str
    """One of `klein_core.image_format.IMAGE_FORMATS`."""
    quality: int | None
    metadata: dict[str, str]

    @property
    def number(self) -> image_pb2.ImageFormat.ValueType:
        """The format's number on the wire."""
        return _NUMBERS[self.name]


def reference_field(spec: pb.ReferenceSpec, model_name: str) -> str:
    """Validates the spec of a reference and returns the client's name for it, `reference` by default.

    Raises:
        InvalidInput: the name is too long.
        UnknownModel: the spec names a model other than `model_name`.
    """
    if len(spec.field_name) > MAX_FIELD_NAME_CHARACTERS:
        raise InvalidInput.of(
            "field_name",
            f"has {len(spec.field_name)} characters; at most {MAX_FIELD_NAME_CHARACTERS} are allowed",
        )
    require_model(spec.model, model_name)
    return spec.field_name or "reference"


async def read_file(
    parts: RequestParts[pb.EncodeReferenceRequest], field: str, limit_bytes: int
) -> list[bytes]:
    """Reads the chunks of a reference's file.

    Args:
        parts: the request after its spec.
        field: name of the reference in errors.
        limit_bytes: largest file; the stream is refused as soon as it sends more.

    Raises:
        InvalidInput: a chunk has the wrong size, or the file is empty or too large.
        ReceiveTimeout: the stream is not complete in time.
    """
    chunks: list[bytes] = []
    received = 0
    async for part in parts:
        chunk = part.image_chunk
        if not 1 <= len(chunk) <= MAX_FRAME_BYTES:
            raise InvalidInput.of(
                field, f"has a chunk of {len(chunk)} bytes; must be in [1, {MAX_FRAME_BYTES}]"
            )
        received += len(chunk)
        if received > limit_bytes:
            raise InvalidInput.of(field, f"is larger than {limit_bytes} bytes, the most allowed")
        chunks.append(chunk)
    if not chunks:
        raise InvalidInput.of(field, "is empty; the image's bytes must follow the spec")
    return chunks


def image_encoding(spec: pb.DecodeSpec, model_name: str) -> Encoding:
    """Validates the spec of a decode and returns the image's file format.

    Raises:
        InvalidInput: format, quality or metadata are not allowed; lists all violations.
        UnknownModel: the spec names a model other than `model_name`.
    """
    require_model(spec.model, model_name)
    if spec.format not in _FORMATS:
        raise InvalidInput.of("format", f"is {int(spec.format)}; must be a known ImageFormat")
    quality = spec.quality if spec.HasField("quality") else None
    encoding = Encoding(_FORMATS[spec.format], quality, dict(spec.metadata))
    violations = [*format_violations(encoding.name, quality), *metadata_violations(encoding.metadata)]
    if violations:
        raise InvalidInput(violations)
    return encoding


async def read_latents(
    parts: RequestParts[pb.DecodeLatentsRequest], encoding: Encoding, channels: int, limits: Limits
) -> FrameReader:
    """Reads the frames of the latents; their size is checked with the first one.

    Args:
        parts: the request after its spec.
        encoding: the image's file format, which may bound its size.
        channels: packed latent channels of the model.
        limits: bounds of the image's size.

    Returns:
        All frames of one tensor of shape (rows, columns, channels).

    Raises:
        InvalidInput: the latents are incomplete or have a shape that is not allowed.
        ReceiveTimeout: the stream is not complete in time.
    """
    token_count = limits.pixel_count // SIZE_MULTIPLE_PX**2
    reader = FrameReader("latents", limit_bytes=token_count * channels * _LARGEST_ELEMENT_BYTES)
    async for part in parts:
        if part.latents.HasField("spec"):
            _check_size(part.latents.spec.shape, encoding, channels, limits)
        reader.add(part.latents)
    reader.require_finished()
    return reader


def latents_tensor(reader: FrameReader) -> torch.Tensor:
    """Returns the latents (rows, columns, channels) on the CPU. Copies them: call it off the event loop.

    Raises:
        InvalidInput: a value is NaN or infinite.
    """
    latents = frames_tensor(reader)
    bad_count = latents.numel() - int(latents.isfinite().sum())
    if bad_count:
        raise InvalidInput.of(
            "latents", f"have {bad_count} values that are NaN or infinite; all must be finite"
        )
    return latents


def _check_size(shape: Sequence[int], encoding: Encoding, channels: int, limits: Limits) -> None:
    if len(shape) != 3 or shape[2] != channels:
        raise InvalidInput.of(
            "latents", f"have shape {shown_shape(shape)}; must be [rows, columns, {channels}]"
        )
    height_px, width_px = (extent * SIZE_MULTIPLE_PX for extent in shape[:2])
    violations = [
        *size_violations(width_px, height_px, limits),
        *format_size_violations(encoding.name, width_px, height_px),
    ]
    for violation in violations:
        size = f"are of a {width_px} × {height_px} image, whose {violation.field}"
        raise InvalidInput.of("latents", f"{size} {violation.description}")
