"""Tensors as streams of frames: cutting them into frames, and checking the frames that arrive. Torch-free."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import xxhash

from klein_api.v1 import denoiser_service_pb2, tensor_pb2
from klein_core.errors import InvalidInput
from klein_services.runtime.protowire import VARINT, WireFrame, encode_header, encode_key, encode_varint

MAX_FRAME_BYTES = 1 << 20
"""Most bytes of a frame's `data`."""
SMALL_FRAME_BYTES = 64 << 10
MAX_EXTENTS = 8
_DATA_FIELD = tensor_pb2.TensorFrame.DATA_FIELD_NUMBER
_INDEX_FIELD = denoiser_service_pb2.IndexedTensorFrame.INDEX_FIELD_NUMBER
_FRAME_FIELD = denoiser_service_pb2.IndexedTensorFrame.FRAME_FIELD_NUMBER

if sys.byteorder != "little":
    raise ImportError("frames are little-endian and this machine is not; a byte swap would be needed here")


@dataclass(frozen=True)
class ElementType:
    """Type of a tensor's elements on the wire."""

    name: str
    """Name in settings and messages."""
    byte_count: int


ELEMENT_TYPES: Mapping[int, ElementType] = {
    tensor_pb2.DATA_TYPE_BF16: ElementType("bf16", 2),
    tensor_pb2.DATA_TYPE_F16: ElementType("f16", 2),
    tensor_pb2.DATA_TYPE_F32: ElementType("f32", 4),
}
"""By `DataType`; tensors of other types are not sent."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and element type of a tensor's bytes."""

    data_type: int
    """A value of `klein_api.v1.DataType`."""
    shape: tuple[int, ...]

    @property
    def byte_count(self) -> int:
        return math.prod(self.shape) * ELEMENT_TYPES[self.data_type].byte_count


@dataclass(frozen=True)
class FrameEnvelope:
    """Position of a frame in the message that carries it."""

    field_number: int
    """Field of the frame, for example `EncodePromptResponse.PROMPT_EMBEDDING_FIELD_NUMBER`."""
    index: int | None = None
    """Index of the IndexedTensorFrame, if the field is one."""

    def header(self, frame_bytes: int) -> bytes:
        """Returns the bytes that precede a serialized frame of `frame_bytes` in its serialized message."""
        if self.index is None:
            return encode_header(self.field_number, frame_bytes)
        index = encode_key(_INDEX_FIELD, VARINT) + encode_varint(self.index)
        inner = index + encode_header(_FRAME_FIELD, frame_bytes)
        return encode_header(self.field_number, len(inner) + frame_bytes) + inner


def serialized_frames(data: memoryview, spec: TensorSpec, envelope: FrameEnvelope) -> Iterator[bytes]:
    """Yields a tensor's frames as serialized messages, each in its envelope, copying the bytes once.

    protobuf's Python classes copy three times and take more than four times the processor time. Arguments and
    errors are those of `split_frames`.
    """
    for chunk, head, tail in _cut(data, spec):
        before = head + encode_header(_DATA_FIELD, len(chunk))
        frame_bytes = len(before) + len(chunk) + len(tail)
        yield b"".join((envelope.header(frame_bytes), before, chunk, tail))


def split_frames(data: memoryview, spec: TensorSpec) -> Iterator[tensor_pb2.TensorFrame]:
    """Yields a tensor's frames; the bytes are hashed and copied one frame at a time.

    Args:
        data: all of the tensor's bytes, contiguous; must not change until the last frame is yielded.
        spec: their shape and element type; `spec.byte_count` must equal the number of bytes.

    Raises:
        ValueError: the number of bytes is not that of `spec`.
    """
    for chunk, head, tail in _cut(data, spec):
        yield tensor_pb2.TensorFrame.FromString(
            b"".join((head, encode_header(_DATA_FIELD, len(chunk)), chunk, tail))
        )


def _cut(data: memoryview, spec: TensorSpec) -> Iterator[tuple[memoryview, bytes, bytes]]:
    """Yields each frame's data with the serialized fields that come before and after it."""
    view = data.cast("B") if data.format != "B" or data.ndim != 1 else data
    if len(view) != spec.byte_count or not len(view):
        raise ValueError(f"{len(view)} bytes do not make a tensor of shape {spec.shape}")
    message = tensor_pb2.TensorSpec(data_type=spec.data_type, shape=spec.shape)  # type: ignore[arg-type]
    head = tensor_pb2.TensorFrame(spec=message).SerializeToString()
    digest = xxhash.xxh3_128()
    for start in range(0, len(view), MAX_FRAME_BYTES):
        chunk = view[start : start + MAX_FRAME_BYTES]
        digest.update(chunk)
        is_last = start + len(chunk) == len(view)
        yield (
            chunk,
            head,
            tensor_pb2.TensorFrame(xxh3=digest.digest()).SerializeToString() if is_last else b"",
        )
        head = b""


class FrameReader:
    """Assembles one tensor from its frames and refuses frames that do not make one.

    Args:
        field: the tensor's name in errors, for example `latents`.
        limit_bytes: most bytes that the tensor may have; checked before memory is taken.
    """

    def __init__(self, field: str, *, limit_bytes: int) -> None:
        self.field = field
        self._limit_bytes = limit_bytes
        self._spec: TensorSpec | None = None
        self._chunks: list[bytes | bytearray | memoryview] = []
        self._received = 0
        self._digest = xxhash.xxh3_128()
        self._finished = False

    @property
    def finished(self) -> bool:
        """Whether all frames have been read and their digest is right."""
        return self._finished

    @property
    def spec(self) -> TensorSpec:
        """Shape and element type; known from the first frame on."""
        if self._spec is None:
            raise self._refusal("has no frames yet")
        return self._spec

    @property
    def has_spec(self) -> bool:
        """Whether the first frame has been read."""
        return self._spec is not None

    @property
    def chunks(self) -> Sequence[bytes | bytearray | memoryview]:
        """The tensor's bytes in pieces, to be copied once to their destination; complete once `finished`."""
        return self._chunks

    @property
    def data(self) -> bytearray:
        """A copy of the tensor's bytes in one piece."""
        return bytearray().join(self._chunks)

    @property
    def digest(self) -> bytes:
        """XXH3-128 of the bytes received so far, big-endian."""
        return self._digest.digest()

    def add(self, frame: tensor_pb2.TensorFrame | WireFrame) -> None:
        """Reads the next frame.

        Raises:
            InvalidInput: the frame is wrong or out of order; names the field.
        """
        if self._finished:
            raise self._refusal("has frames after its last one")
        if self._spec is None:
            self._spec = self._checked_spec(frame)
        elif frame.HasField("spec"):
            raise self._refusal("has a second spec; only the first frame carries one")
        data = frame.data
        if not 1 <= len(data) <= MAX_FRAME_BYTES:
            raise self._refusal(f"has a frame of {len(data)} bytes; must be in [1, {MAX_FRAME_BYTES}]")
        self._received += len(data)
        if self._received > self._spec.byte_count:
            raise self._refusal(f"has more bytes than the {self._spec.byte_count} of its shape")
        self._digest.update(data)
        self._keep(data)
        if self._received == self._spec.byte_count:
            if not frame.HasField("xxh3"):
                raise self._refusal("has no xxh3 on its last frame")
            if frame.xxh3 != self._digest.digest():
                raise self._refusal("is not what was sent: its bytes do not match its xxh3 digest")
            self._finished = True
        elif frame.HasField("xxh3"):
            raise self._refusal(
                f"ends after {self._received} of {self.spec.byte_count} bytes; only the last frame carries xxh3"
            )

    def require_finished(self) -> None:
        """Checks that the tensor is complete; called when the stream has ended.

        Raises:
            InvalidInput: frames are missing.
        """
        if self._finished:
            return
        if self._spec is None:
            raise self._refusal("is missing: the stream ended before its first frame")
        raise self._refusal(
            f"is incomplete: the stream ended after {self._received} of {self.spec.byte_count} bytes"
        )

    def _checked_spec(self, frame: tensor_pb2.TensorFrame | WireFrame) -> TensorSpec:
        if frame.spec is None or not frame.HasField("spec"):
            raise self._refusal("has no spec on its first frame")
        data_type, shape = frame.spec.data_type, tuple(frame.spec.shape[: MAX_EXTENTS + 1])
        if data_type not in ELEMENT_TYPES:
            raise self._refusal(f"has data type {int(data_type)}; must be BF16, F16 or F32")
        if not 1 <= len(shape) <= MAX_EXTENTS or min(shape) < 1:
            raise self._refusal(
                f"has shape {shown_shape(shape)}; must have 1 to {MAX_EXTENTS} extents, each at least 1"
            )
        spec = TensorSpec(int(data_type), shape)
        if spec.byte_count > self._limit_bytes:
            raise self._refusal(
                f"has shape {shown_shape(shape)}, {spec.byte_count} bytes; at most {self._limit_bytes} are allowed"
            )
        return spec

    def _keep(self, data: bytes | memoryview) -> None:
        # Small frames are joined: Python's overhead for each would be many times its size.
        if len(data) >= SMALL_FRAME_BYTES:
            self._chunks.append(data)
            return
        last = self._chunks[-1] if self._chunks else None
        if not isinstance(last, bytearray) or len(last) >= MAX_FRAME_BYTES:
            last = bytearray()
            self._chunks.append(last)
        last += data

    def _refusal(self, description: str) -> InvalidInput:
        return InvalidInput.of(self.field, description)


def shown_shape(shape: Sequence[int]) -> str:
    """Returns a shape as text, cut off after the most extents that a tensor may have."""
    extents = [str(extent) for extent in shape[:MAX_EXTENTS]] + ["…"] * (len(shape) > MAX_EXTENTS)
    return f"[{', '.join(extents)}]"
