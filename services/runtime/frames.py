"""Tensors as streams of frames: cutting them, and checking what arrives. Torch-free."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash
from klein_api.v1 import tensor_pb2

from klein_core.errors import InvalidInput

MAX_FRAME_BYTES = 1 << 20
"""Most bytes of a frame's `data`."""
MAX_EXTENTS = 8
ELEMENT_BYTES: dict[int, int] = {
    tensor_pb2.DATA_TYPE_BF16: 2,
    tensor_pb2.DATA_TYPE_F16: 2,
    tensor_pb2.DATA_TYPE_F32: 4,
}
"""Bytes of one element by `DataType`."""

if sys.byteorder != "little":
    raise ImportError("frames are little-endian and this machine is not; a byte swap would be needed here")


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor's bytes mean."""

    data_type: int
    """A value of `klein_api.v1.DataType`."""
    shape: tuple[int, ...]

    @property
    def byte_count(self) -> int:
        return math.prod(self.shape) * ELEMENT_BYTES[self.data_type]


def split_frames(data: memoryview, spec: TensorSpec) -> Iterator[tensor_pb2.TensorFrame]:
    """Yields a tensor's frames; the bytes are hashed and copied one frame at a time.

    Args:
        data: all of the tensor's bytes, contiguous; must not change until the last frame is taken.
        spec: what they mean; `spec.byte_count` must equal the number of bytes.

    Raises:
        ValueError: the bytes are not what `spec` says, a fault of the caller's.
    """
    view = data.cast("B") if data.format != "B" or data.ndim != 1 else data
    if len(view) != spec.byte_count or not len(view):
        raise ValueError(f"{len(view)} bytes do not make a tensor of shape {spec.shape}")
    digest = xxhash.xxh3_128()
    for start in range(0, len(view), MAX_FRAME_BYTES):
        chunk = bytes(view[start : start + MAX_FRAME_BYTES])
        digest.update(chunk)
        frame = tensor_pb2.TensorFrame(data=chunk)
        if start == 0:
            frame.spec.data_type = spec.data_type  # type: ignore[assignment]
            frame.spec.shape.extend(spec.shape)
        if start + len(chunk) == len(view):
            frame.xxh3 = digest.digest()
        yield frame


class FrameReader:
    """Puts one tensor together and refuses whatever is not one.

    Args:
        field: the tensor's name in errors, for example `latents`.
        limit_bytes: most bytes that the tensor may have; checked before memory is taken.
    """

    def __init__(self, field: str, *, limit_bytes: int) -> None:
        self.field = field
        self._limit_bytes = limit_bytes
        self._spec: TensorSpec | None = None
        self._data = bytearray()
        self._received = 0
        self._digest = xxhash.xxh3_128()
        self._finished = False

    @property
    def finished(self) -> bool:
        """Whether the last frame has come and its digest was right."""
        return self._finished

    @property
    def spec(self) -> TensorSpec:
        """What the bytes mean; known from the first frame on."""
        if self._spec is None:
            raise self._refusal("has no frames yet")
        return self._spec

    @property
    def data(self) -> bytearray:
        """The tensor's bytes; all there once `finished`."""
        return self._data

    @property
    def digest(self) -> bytes:
        """XXH3-128 of the bytes received so far, big-endian."""
        return self._digest.digest()

    def add(self, frame: tensor_pb2.TensorFrame) -> None:
        """Takes the next frame.

        Raises:
            InvalidInput: the frame cannot follow those before it; names the field and what is wrong.
        """
        if self._finished:
            raise self._refusal("has frames after its last one")
        if self._spec is None:
            self._begin(frame)
        elif frame.HasField("spec"):
            raise self._refusal("has a second spec; only the first frame carries one")
        self._append(frame.data)
        if self._received == len(self._data):
            self._finish(frame)
        elif frame.HasField("xxh3"):
            raise self._refusal(
                f"ends after {self._received} of {len(self._data)} bytes; only the last frame carries xxh3"
            )

    def require_finished(self) -> None:
        """Checks that the tensor is whole; for when the stream has ended.

        Raises:
            InvalidInput: frames are missing.
        """
        if self._finished:
            return
        if self._spec is None:
            raise self._refusal("is missing: the stream ended before its first frame")
        raise self._refusal(
            f"is incomplete: the stream ended after {self._received} of {len(self._data)} bytes"
        )

    def _begin(self, frame: tensor_pb2.TensorFrame) -> None:
        if not frame.HasField("spec"):
            raise self._refusal("has no spec on its first frame")
        data_type, shape = frame.spec.data_type, tuple(frame.spec.shape)
        if data_type not in ELEMENT_BYTES:
            raise self._refusal(f"has data type {int(data_type)}; must be BF16, F16 or F32")
        if not 1 <= len(shape) <= MAX_EXTENTS or min(shape) < 1:
            raise self._refusal(
                f"has shape {_shown(shape)}; must have 1 to {MAX_EXTENTS} extents, each at least 1"
            )
        spec = TensorSpec(int(data_type), shape)
        if spec.byte_count > self._limit_bytes:
            raise self._refusal(
                f"has shape {_shown(shape)}, {spec.byte_count} bytes; at most {self._limit_bytes} are allowed"
            )
        self._spec = spec
        self._data = bytearray(spec.byte_count)

    def _append(self, data: bytes) -> None:
        if not 1 <= len(data) <= MAX_FRAME_BYTES:
            raise self._refusal(f"has a frame of {len(data)} bytes; must be in [1, {MAX_FRAME_BYTES}]")
        end = self._received + len(data)
        if end > len(self._data):
            raise self._refusal(f"has more bytes than the {len(self._data)} of its shape")
        memoryview(self._data)[self._received : end] = data
        self._digest.update(data)
        self._received = end

    def _finish(self, frame: tensor_pb2.TensorFrame) -> None:
        if not frame.HasField("xxh3"):
            raise self._refusal("has no xxh3 on its last frame")
        if frame.xxh3 != self._digest.digest():
            raise self._refusal("is not what was sent: its bytes do not match its xxh3 digest")
        self._finished = True

    def _refusal(self, description: str) -> InvalidInput:
        return InvalidInput.of(self.field, description)


def _shown(shape: tuple[int, ...]) -> str:
    extents = [str(extent) for extent in shape[:MAX_EXTENTS]] + ["…"] * (len(shape) > MAX_EXTENTS)
    return f"[{', '.join(extents)}]"
