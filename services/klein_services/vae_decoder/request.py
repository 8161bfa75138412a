"""Validation and reading of the streamed requests: EncodeReference, EncodeInitialImage and DecodeLatents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from klein_api.v1 import image_pb2
from klein_api.v1 import vae_decoder_service_pb2 as pb
from klein_core.errors import InvalidInput
from klein_core.image_format import format_size_violations, format_violations, metadata_violations
from klein_core.params import SIZE_MULTIPLE_PX, Limits, size_violations
from klein_core.vae_decoder.image_io import ReferenceLimits
from klein_core.vae_decoder.initial_image import InitialImage
from klein_services.runtime.frames import FrameReader, shown_shape
from klein_services.runtime.request_parts import RequestParts
from klein_services.runtime.stage import require_model
from klein_services.runtime.tensors import frames_tensor
from klein_services.vae_decoder.held_bytes import RequestBytes
from klein_services.vae_decoder.uploads import FileReader, InitialImageFiles, Preparation

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
    parts: RequestParts[pb.EncodeReferenceRequest], field: str, limit_bytes: int, held: RequestBytes
) -> FileReader:
    """Reads the chunks of a reference's file.

    Args:
        parts: the request after its spec.
        field: name of the reference in errors.
        limit_bytes: largest file.
        held: counts the bytes.

    Raises:
        InvalidInput: a chunk has the wrong size, or the file is empty or too large.
        QueueFull: requests hold too many bytes.
        ReceiveTimeout: the stream is not complete in time.
    """
    file = FileReader(field, limit_bytes, held)
    async for part in parts:
        file.add(part.image_chunk)
    file.require_data()
    return file


async def read_initial_image(
    parts: RequestParts[pb.EncodeInitialImageRequest],
    preparation: Preparation,
    limit_bytes: int,
    held: RequestBytes,
) -> InitialImageFiles:
    """Reads the chunks of an initial image's file and of its mask's, if there is one.

    Args:
        parts: the request after its spec.
        preparation: how the files are prepared.
        limit_bytes: largest file, each.
        held: counts the bytes.

    Raises:
        InvalidInput: a file has the wrong size, or one that is needed is missing.
        QueueFull: requests hold too many bytes.
        ReceiveTimeout: the stream is not complete in time.
    """
    files = InitialImageFiles(preparation, limit_bytes, held)
    async for part in parts:
        if part.WhichOneof("part") == "mask_chunk":
            files.add_mask(part.mask_chunk)
        else:
            files.add_image(part.image_chunk)
    files.require_complete()
    return files


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
    parts: RequestParts[pb.DecodeLatentsRequest],
    encoding: Encoding,
    channels: int,
    limits: Limits,
    overlay: InitialImageFiles | None = None,
) -> FrameReader:
    """Reads the files of an overlay and the frames of the latents; their size is checked with the first one.

    Args:
        parts: the request after its spec.
        encoding: the image's file format, which may bound its size.
        channels: packed latent channels of the model.
        limits: bounds of the image's size.
        overlay: receives the overlay's files, which precede the latents; `None` refuses such files.

    Returns:
        All frames of one tensor of shape (rows, columns, channels).

    Raises:
        InvalidInput: the latents are incomplete or have a shape that is not allowed, or files do not fit the overlay.
        QueueFull: requests hold too many bytes of files.
        ReceiveTimeout: the stream is not complete in time.
    """
    token_count = limits.pixel_count // SIZE_MULTIPLE_PX**2
    reader = FrameReader("latents", limit_bytes=token_count * channels * _LARGEST_ELEMENT_BYTES)
    async for part in parts:
        arm = part.WhichOneof("part")
        if arm == "latents":
            if part.latents.HasField("spec"):
                _check_size(part.latents.spec.shape, encoding, channels, limits)
            reader.add(part.latents)
            continue
        field = "mask" if arm == "mask_chunk" else "initial_image"
        if overlay is None:
            raise InvalidInput.of(field, "is not expected: the spec has no overlay")
        if reader.has_spec:
            raise InvalidInput.of(field, "has chunks after the latents; it must come before them")
        if arm == "mask_chunk":
            overlay.add_mask(part.mask_chunk)
        else:
            overlay.add_image(part.initial_image_chunk)
    if overlay is not None:
        overlay.require_complete()
    reader.require_finished()
    return reader


def overlay_image(files: InitialImageFiles, limits: ReferenceLimits, latents: FrameReader) -> InitialImage:
    """Returns the prepared initial image that decoded latents are laid into. Slow: call it off the event loop.

    Raises:
        InvalidInput: as `prepare_initial_image`; or the latents are of an image of another size.
    """
    image = files.prepare(limits)
    rows, columns, _ = latents.spec.shape
    made, expected = (columns * SIZE_MULTIPLE_PX, rows * SIZE_MULTIPLE_PX), (image.width_px, image.height_px)
    if made != expected:
        raise InvalidInput.of(
            "latents",
            f"are of a {made[0]} × {made[1]} image; the overlay's is {expected[0]} × {expected[1]}",
        )
    return image


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
