"""Reads messages that carry a tensor's frame without copying the frame.

protobuf's Python classes copy a bytes field twice, into the message and out of it, which costs a receiver a
sixth of its time for a tensor. Here such a message becomes an object that answers like it and whose data is a
view of what gRPC received. Whatever is not in the usual form is left to protobuf.
"""

from __future__ import annotations

from collections.abc import Callable
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

    def deserialise(raw: bytes) -> Any:
        try:
            number, payload, rest = _field(memoryview(raw))
            if number in arms and not rest:
                return FrameMessage(arms[number], _read_frame(payload))
        except (_UnusualError, DecodeError):
            pass  # protobuf decides, and complains if there is reason to
        return message_class.FromString(raw)

    return deserialise


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
