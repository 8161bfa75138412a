"""Reads messages that carry a tensor's frame without copying the frame.

protobuf's Python classes copy a bytes field twice, into the message and out of it, which costs a receiver a
sixth of its time for a tensor. Here such a message becomes an object that answers like it and whose data is a
view of what gRPC received. Whatever is not in the usual form is left to protobuf.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.message import DecodeError, Message

from klein_api.v1 import tensor_pb2

_FRAME = tensor_pb2.TensorFrame
_LENGTH_DELIMITED = 2
_VARINT_BYTES = 5


class WireFrame:
    """Answers like a TensorFrame; an absent `spec` or `xxh3` is `None`."""

    __slots__ = ("data", "spec", "xxh3")

    def __init__(self) -> None:
        self.spec: tensor_pb2.TensorSpec | None = None
        self.data: memoryview | bytes = b""
        self.xxh3: bytes | None = None

    def HasField(self, name: str) -> bool:
        """Returns whether `spec` or `xxh3` is there."""
        return getattr(self, name) is not None


class FrameMessage:
    """Answers like a message whose oneof holds a TensorFrame, which is an attribute of the arm's name."""

    def __init__(self, arm: str, frame: WireFrame) -> None:
        self._arm = arm
        setattr(self, arm, frame)

    def WhichOneof(self, name: str) -> str:
        """Returns the arm's name."""
        return self._arm


def frame_deserializer(message_class: type[Message]) -> Callable[[bytes], Any]:
    """Returns what turns bytes into a message of the class, or into a FrameMessage that stands for it."""
    arms = _frame_arms(message_class)
    if not arms:
        return message_class.FromString

    def deserialize(raw: bytes) -> Any:
        try:
            number, payload, rest = _field(memoryview(raw))
            if number in arms and not rest:
                return FrameMessage(arms[number], _read_frame(payload))
        except (_UnusualError, DecodeError):
            pass  # protobuf decides, and complains if there is reason to
        return message_class.FromString(raw)

    return deserialize


class _UnusualError(Exception):
    """The bytes are not what this suite's own servers send; they may still be valid."""


def _frame_arms(message_class: type[Message]) -> dict[int, str]:
    return {
        field.number: field.name
        for oneof in message_class.DESCRIPTOR.oneofs
        for field in oneof.fields
        if field.message_type is _FRAME.DESCRIPTOR
    }


def _read_frame(view: memoryview) -> WireFrame:
    frame = WireFrame()
    last_number = 0
    while view:
        number, payload, view = _field(view)
        if number <= last_number:
            raise _UnusualError
        last_number = number
        if number == _FRAME.SPEC_FIELD_NUMBER:
            frame.spec = tensor_pb2.TensorSpec.FromString(bytes(payload))
        elif number == _FRAME.DATA_FIELD_NUMBER:
            frame.data = payload
        elif number == _FRAME.XXH3_FIELD_NUMBER:
            frame.xxh3 = bytes(payload)
        else:
            raise _UnusualError
    return frame


def _field(view: memoryview) -> tuple[int, memoryview, memoryview]:
    """Splits off the first field: its number, its bytes, the rest. Only length-delimited ones are usual."""
    tag, start = _varint(view, 0)
    if tag & 7 != _LENGTH_DELIMITED:
        raise _UnusualError
    length, start = _varint(view, start)
    if start + length > len(view):
        raise _UnusualError
    return tag >> 3, view[start : start + length], view[start + length :]


def _varint(view: memoryview, start: int) -> tuple[int, int]:
    """Reads a varint; returns it and where the next byte is."""
    value = 0
    for position, byte in enumerate(view[start : start + _VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            return value, start + position + 1
    raise _UnusualError


_CHUNK = b"\x12"
"""Key of `DecodeLatentsResponse.image_chunk`, field 2."""
_FRAME_TAG = 0x12
"""Key of field 2, length-delimited."""
_INDEX = 0x08
"""Key of field 1, varint."""
_DIGEST = 0x1A
"""Key of `TensorFrame.xxh3`; all fields of a frame are length-delimited."""
_NEGATIVE_PROMPT_EMBEDDING = b"\x1a"
"""Key of `DenoiseLatentsRequest.negative_prompt_embedding`."""
_REFERENCE_LATENTS = b"\x22"
"""Key of `DenoiseLatentsRequest.reference_latents`."""


def field_number(message: bytes) -> int:
    """Returns the number of a message's first field, which tells a oneof's arm; 0 for an empty message."""
    return message[0] >> 3 if message else 0


def frame_field(message: bytes) -> bytes | None:
    """Returns `message` if it is field 2 and nothing else, else `None`."""
    return message if _frame_ends_at(message, 0) == len(message) else None


def indexed_frame_field(message: bytes) -> tuple[int, bytes] | None:
    """Takes an `IndexedTensorFrame` out of a message that holds nothing else.

    Returns:
        The index and the frame as field 2, or `None` for another layout.
    """
    length, start = _read_varint(message, 1)
    if length < 0 or start + length != len(message):
        return None
    index = 0
    if start < len(message) and message[start] == _INDEX:
        index, start = _read_varint(message, start + 1)
        if index < 0:
            return None
    return (index, message[start:]) if _frame_ends_at(message, start) == len(message) else None


def is_last_frame(frame: bytes) -> bool:
    """Returns whether a frame, as field 2, is its tensor's last: the last one carries `xxh3`, its field 3."""
    _, position = _read_varint(frame, 1)
    key = 0
    while 0 <= position < len(frame):
        key = frame[position]
        length, begin = _read_varint(frame, position + 1)
        position = begin + length if length >= 0 else -1
    return key == _DIGEST and position == len(frame)


def as_negative_prompt_embedding(frame: bytes) -> bytes:
    """Makes field 2 a `DenoiseLatentsRequest` of the negative prompt's embedding."""
    return _NEGATIVE_PROMPT_EMBEDDING + frame[1:]


def as_reference_latents(index: int, frame: bytes) -> bytes:
    """Makes field 2 a `DenoiseLatentsRequest` of reference `index`'s latents."""
    head = bytes([_INDEX]) + _encoded_varint(index) if index else b""
    return b"".join((_REFERENCE_LATENTS, _encoded_varint(len(head) + len(frame)), head, frame))


def chunk_of(message: bytes) -> memoryview | None:
    """Returns the content of a message that is one field 2 and nothing else, uncopied, else `None`."""
    length, begin = _read_varint(message, 1)
    whole = message[:1] == _CHUNK and length >= 0 and begin + length == len(message)
    return memoryview(message)[begin:] if whole else None


def enclosed(field_number: int, parts: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """Makes a length-delimited field of parts that are copied only when all is joined."""
    key = _encoded_varint(field_number << 3 | _LENGTH_DELIMITED)
    return [key, _encoded_varint(sum(map(len, parts))), *parts]


def _frame_ends_at(message: bytes, start: int) -> int:
    """Returns where the field 2 that begins at `start` ends, or -1 where there is none."""
    if start >= len(message) or message[start] != _FRAME_TAG:
        return -1
    length, begin = _read_varint(message, start + 1)
    return begin + length if length >= 0 else -1


def _read_varint(message: bytes, start: int) -> tuple[int, int]:
    """Reads a varint of at most five bytes: its value and where it ends; -1 for what is none."""
    value = 0
    for position in range(start, min(start + 5, len(message))):
        value |= (message[position] & 0x7F) << (7 * (position - start))
        if message[position] < 0x80:
            return value, position + 1
    return -1, start


def _encoded_varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
