"""Tensors as stages send them: frames with a spec, bytes and a digest. Without torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import xxhash

from klein_api.v1 import tensor_pb2
from klein_client.errors import InternalError

FRAME_BYTES = 1 << 20
"""Most bytes of a frame's data."""
TENSOR_BYTES = 256 << 20
"""Most bytes of a tensor that a stage may answer with."""
MAX_EXTENTS = 8
ELEMENT_BYTES: Mapping[int, int] = {
    tensor_pb2.DATA_TYPE_BF16: 2,
    tensor_pb2.DATA_TYPE_F16: 2,
    tensor_pb2.DATA_TYPE_F32: 4,
}
"""Bytes of an element by `DataType`; tensors of other types are not sent."""

if sys.byteorder != "little":
    raise ImportError("frames are little-endian and this machine is not; a byte swap would be needed here")


@dataclass(frozen=True)
class Tensor:
    """A tensor as it is sent: row-major, little-endian, unpadded."""

    data_type: int
    """A value of `klein_api.v1.DataType`."""
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview = field(repr=False)

    def __post_init__(self) -> None:
        if self.data_type not in ELEMENT_BYTES:
            raise ValueError("tensors of this element type are not sent; only bf16, f16 and f32 are")
        expected = math.prod(self.shape) * ELEMENT_BYTES[self.data_type]
        if not expected or len(self.data) != expected:
            raise ValueError(f"{len(self.data)} bytes do not make a tensor of shape {list(self.shape)}")

    def frames(self) -> Iterator[tensor_pb2.TensorFrame]:
        """Yields the tensor in frames: the first has the spec, the last the digest."""
        digest = xxhash.xxh3_128()
        view = memoryview(self.data)
        for start in range(0, len(view), FRAME_BYTES):
            piece = view[start : start + FRAME_BYTES]
            digest.update(piece)
            frame = tensor_pb2.TensorFrame(data=bytes(piece))
            if start == 0:
                frame.spec.data_type = self.data_type  # type: ignore[assignment]
                frame.spec.shape.extend(self.shape)
            if start + len(piece) == len(view):
                frame.xxh3 = digest.digest()
            yield frame


class TensorReader:
    """Puts a tensor together from its frames, and refuses frames that do not make one.

    Args:
        name: of the tensor, in errors.
        rank: extents that its shape must have.
        limit_bytes: most bytes that it may have; checked before memory is taken.
    """

    def __init__(self, name: str, rank: int, limit_bytes: int = TENSOR_BYTES) -> None:
        self._name = name
        self._rank = rank
        self._limit_bytes = limit_bytes
        self._shape: tuple[int, ...] = ()
        self._data_type = 0
        self._byte_count = 0
        self._data = bytearray()
        self._digest = xxhash.xxh3_128()
        self._is_finished = False

    def add(self, frame: tensor_pb2.TensorFrame) -> None:
        """Reads the next frame.

        Raises:
            InternalError: it is wrong or out of order.
        """
        if self._is_finished:
            raise self._refusal("has frames after its last one")
        if frame.HasField("spec") != (not self._shape):
            raise self._refusal("has a second spec" if self._shape else "has no spec on its first frame")
        if not self._shape:
            self._read_spec(frame.spec)
        if not 1 <= len(frame.data) <= FRAME_BYTES:
            raise self._refusal(f"has a frame of {len(frame.data)} bytes; must be in [1, {FRAME_BYTES}]")
        if len(self._data) + len(frame.data) > self._byte_count:
            raise self._refusal(f"has more bytes than the {self._byte_count} of its shape")
        self._data += frame.data
        self._digest.update(frame.data)
        is_last = len(self._data) == self._byte_count
        if frame.HasField("xxh3") != is_last:
            raise self._refusal("has its xxh3 digest on another frame than the last")
        if is_last and frame.xxh3 != self._digest.digest():
            raise self._refusal("is not what was sent: its bytes do not match its xxh3 digest")
        self._is_finished = is_last

    def tensor(self) -> Tensor:
        """Returns the tensor; called when the stream has ended.

        Raises:
            InternalError: frames are missing.
        """
        if not self._is_finished:
            raise self._refusal(
                f"is incomplete: the stream ended after {len(self._data)} of {self._byte_count} bytes"
            )
        return Tensor(self._data_type, self._shape, self._data)

    def _read_spec(self, spec: tensor_pb2.TensorSpec) -> None:
        shape = tuple(spec.shape[: MAX_EXTENTS + 1])
        if spec.data_type not in ELEMENT_BYTES:
            raise self._refusal(f"has data type {int(spec.data_type)}; must be BF16, F16 or F32")
        if len(shape) != self._rank or min(shape) < 1:
            raise self._refusal(f"has shape {list(shape)}; must have {self._rank} extents, each at least 1")
        byte_count = math.prod(shape) * ELEMENT_BYTES[spec.data_type]
        if byte_count > self._limit_bytes:
            raise self._refusal(f"has {byte_count} bytes; at most {self._limit_bytes} are allowed")
        self._data_type, self._shape, self._byte_count = int(spec.data_type), shape, byte_count

    def _refusal(self, description: str) -> InternalError:
        return InternalError(f"the stage broke the protocol: {self._name} {description}")
