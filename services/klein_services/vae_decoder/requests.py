"""The two streamed requests, put together and checked while they arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from klein_api.v1 import image_pb2
from klein_api.v1 import vae_decoder_service_pb2 as pb
from klein_core.errors import InvalidInput
from klein_core.image_format import format_size_violations, format_violations, metadata_violations
from klein_core.params import SIZE_MULTIPLE_PX, Limits, size_violations
from klein_services.runtime.frames import MAX_FRAME_BYTES, FrameReader, shown_shape
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
    """How an image is to be encoded."""

    name: str
    """One of `klein_core.image_format.IMAGE_FORMATS`."""
    quality: int | None
    metadata: dict[str, str]

    @property
    def number(self) -> image_pb2.ImageFormat.ValueType:
        """The wire's name of the format."""
        return _NUMBERS[self.name]


class ReferenceRequest:
    """An EncodeReference request.

    Args:
        model_name: the only model that is served.
        limit_bytes: most bytes of the file; more are refused when they arrive.
        admit: called when the spec is good, before any byte is kept; may raise.
    """

    def __init__(self, model_name: str, limit_bytes: int, admit: Callable[[], None]) -> None:
        self._model_name = model_name
        self._limit_bytes = limit_bytes
        self._admit = admit
        self._chunks: list[bytes] = []
        self._received = 0
        self.field = ""
        """The caller's name for the reference; known after the first part."""

    def accept(self, request: pb.EncodeReferenceRequest) -> None:
        """Takes the next part. Raises InvalidInput or UnknownModel."""
        part = request.WhichOneof("part")
        if part == "spec":
            self._begin(request.spec)
        elif not self.field:
            raise InvalidInput.of("spec", "is missing; the first part of the request must be the spec")
        elif part == "image_chunk":
            self._append(request.image_chunk)
        else:
            raise InvalidInput.of("part", "is empty; each part must be a spec or an image_chunk")

    def require_finished(self) -> None:
        """Checks that all is there, once the caller has closed its side. Raises InvalidInput."""
        if not self.field:
            raise InvalidInput.of("spec", "is missing; the first part of the request must be the spec")
        if not self._received:
            raise InvalidInput.of(self.field, "is empty; the image's bytes must follow the spec")

    def file(self) -> bytes:
        """Returns the file. Copies it, so call it off the event loop."""
        return b"".join(self._chunks)

    def _begin(self, spec: pb.ReferenceSpec) -> None:
        if self.field:
            raise InvalidInput.of("spec", "comes twice; only the first part may be a spec")
        if len(spec.field_name) > MAX_FIELD_NAME_CHARACTERS:
            raise InvalidInput.of(
                "field_name",
                f"has {len(spec.field_name)} characters; at most {MAX_FIELD_NAME_CHARACTERS} are allowed",
            )
        require_model(spec.model, self._model_name)
        self._admit()
        self.field = spec.field_name or "reference"

    def _append(self, chunk: bytes) -> None:
        if not 1 <= len(chunk) <= MAX_FRAME_BYTES:
            raise InvalidInput.of(
                self.field, f"has a chunk of {len(chunk)} bytes; must be in [1, {MAX_FRAME_BYTES}]"
            )
        self._received += len(chunk)
        if self._received > self._limit_bytes:
            raise InvalidInput.of(self.field, f"is larger than {self._limit_bytes} bytes, the most allowed")
        self._chunks.append(chunk)


class DecodeRequest:
    """A DecodeLatents request.

    Args:
        model_name: the only model that is served.
        channels: latent channels of the model.
        limits: bounds of the image's size.
        admit: called when the spec is good, before any byte is kept; may raise.
    """

    def __init__(self, model_name: str, channels: int, limits: Limits, admit: Callable[[], None]) -> None:
        self._model_name = model_name
        self._admit = admit
        self._channels = channels
        self._limits = limits
        self._encoding: Encoding | None = None
        token_count = limits.pixel_count // SIZE_MULTIPLE_PX**2
        self._reader = FrameReader("latents", limit_bytes=token_count * channels * _LARGEST_ELEMENT_BYTES)

    @property
    def encoding(self) -> Encoding:
        """How to encode the image. Raises InvalidInput when the request had no spec."""
        if self._encoding is None:
            raise InvalidInput.of("spec", "is missing; the first part of the request must be the spec")
        return self._encoding

    def accept(self, request: pb.DecodeLatentsRequest) -> None:
        """Takes the next part. Raises InvalidInput or UnknownModel."""
        part = request.WhichOneof("part")
        if part == "spec":
            self._begin(request.spec)
        elif self.encoding and part == "latents":
            if request.latents.HasField("spec"):
                self._check_size(request.latents.spec.shape)
            self._reader.add(request.latents)
        else:
            raise InvalidInput.of("part", "is empty; each part must be a spec or a frame of latents")

    def require_finished(self) -> None:
        """Checks that all is there, once the caller has closed its side. Raises InvalidInput."""
        self._encoding = self.encoding
        self._reader.require_finished()

    def latents(self) -> torch.Tensor:
        """Returns the latents (rows, columns, channels) on the CPU. Copies them: call it off the event loop.

        Raises:
            InvalidInput: a value is NaN or infinite.
        """
        latents = frames_tensor(self._reader)
        bad_count = latents.numel() - int(latents.isfinite().sum())
        if bad_count:
            raise InvalidInput.of(
                "latents", f"have {bad_count} values that are NaN or infinite; all must be finite"
            )
        return latents

    def _begin(self, spec: pb.DecodeSpec) -> None:
        if self._encoding is not None:
            raise InvalidInput.of("spec", "comes twice; only the first part may be a spec")
        require_model(spec.model, self._model_name)
        if spec.format not in _FORMATS:
            raise InvalidInput.of("format", f"is {int(spec.format)}; must be a known ImageFormat")
        quality = spec.quality if spec.HasField("quality") else None
        name = _FORMATS[spec.format]
        metadata = dict(spec.metadata)
        violations = [*format_violations(name, quality), *metadata_violations(metadata)]
        if violations:
            raise InvalidInput(violations)
        self._admit()
        self._encoding = Encoding(name, quality, metadata)

    def _check_size(self, shape: Sequence[int]) -> None:
        if len(shape) != 3 or shape[2] != self._channels:
            raise InvalidInput.of(
                "latents", f"have shape {shown_shape(shape)}; must be [rows, columns, {self._channels}]"
            )
        height_px, width_px = (extent * SIZE_MULTIPLE_PX for extent in shape[:2])
        violations = [
            *size_violations(width_px, height_px, self._limits),
            *format_size_violations(self.encoding.name, width_px, height_px),
        ]
        for violation in violations:
            size = f"are of a {width_px} × {height_px} image, whose {violation.field}"
            raise InvalidInput.of("latents", f"{size} {violation.description}")
