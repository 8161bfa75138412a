"""Protobuf's wire format for messages that carry frames and chunks, read and written without copying them.

protobuf's Python classes copy a bytes field twice, into the message and out of it, which costs a receiver a
sixth of its time for a tensor. `frame_deserializer` makes such a message an object that answers like it and
whose data is a view of what gRPC received; the functions after it move a serialized frame from one message to
another. Bytes in any layout that this suite's servers do not send are left to protobuf.

Reference: https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError, Message

from klein_api.v1 import tensor_pb2

VARINT = 0
LENGTH_DELIMITED = 2
_CONTINUED = 0x80
"""Bit of a varint's byte that another byte follows."""
_VARINT_BYTES = 5
"""Most bytes of a varint here: 35 bits hold every key, length and index."""
_FRAME = tensor_pb2.TensorFrame
_FRAME_KEY = b"\x12"
"""Key of field 2, length-delimited: the frame in every message that carries one, and the image's chunk."""
_INDEX_KEY = b"\x08"
"""Key of `IndexedTensorFrame.index`."""
_NEGATIVE_PROMPT_EMBEDDING_KEY = b"\x1a"
"""Key of `DenoiseLatentsRequest.negative_prompt_embedding`."""
_REFERENCE_LATENTS_KEY = b"\x22"
"""Key of `DenoiseLatentsRequest.reference_latents`."""
_RESUME_LATENTS_KEY = b"\x2a"
"""Key of `DenoiseLatentsRequest.resume_latents`."""
_INITIAL_IMAGE_KEYS = {b"\x12": b"\x32", b"\x1a": b"\x3a"}
"""Keys of `DenoiseLatentsRequest` by those of `EncodeInitialImageResponse`: of initial latents and mask."""
_FRAME_FIELD = 2
_CHUNK_BYTES = 1 << 20
"""Most bytes of a file in one message."""


class UnusualLayout(Exception):
    """The bytes are not in the layout that this suite's servers send; they may still be a valid message."""


def encode_varint(value: int) -> bytes:
    """Returns a number that is not negative as a varint."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def decode_varint(view: memoryview, start: int) -> tuple[int, int]:
    """Reads a varint of at most five bytes; returns its value and the position after it.

    Raises:
        UnusualLayout: there is no such varint.
    """
    value = 0
    for position in range(start, min(start + _VARINT_BYTES, len(view))):
        byte = view[position]
        value |= (byte & 0x7F) << (7 * (position - start))
        if byte < 0x80:
            return value, position + 1
    raise UnusualLayout


def encode_key(field_number: int, wire_type: int) -> bytes:
    """Returns the key that precedes a field."""
    return encode_varint(field_number << 3 | wire_type)


def encode_header(field_number: int, length: int) -> bytes:
    """Returns the key and the length that precede a length-delimited field."""
    return encode_key(field_number, LENGTH_DELIMITED) + encode_varint(length)


def split_field(view: memoryview) -> tuple[int, memoryview, memoryview]:
    """Splits off a message's first field; returns its number, its content and the rest.

    Raises:
        UnusualLayout: the field is not length-delimited or not complete.
    """
    key, start = decode_varint(view, 0)
    if key & 7 != LENGTH_DELIMITED:
        raise UnusualLayout
    length, start = decode_varint(view, start)
    if start + length > len(view):
        raise UnusualLayout
    return key >> 3, view[start : start + length], view[start + length :]


def split_fields(view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yields number and content of each field of a message whose fields are all length-delimited.

    Raises:
        UnusualLayout: one is not.
    """
    while view:
        number, content, view = split_field(view)
        yield number, content


class WireFrame:
    """Answers like a TensorFrame; an absent `spec` or `xxh3` is `None`."""

    __slots__ = ("data", "spec", "xxh3")

    def __init__(self) -> None:
        self.spec: tensor_pb2.TensorSpec | None = None
        self.data: memoryview | bytes = b""
        self.xxh3: bytes | None = None

    def HasField(self, name: str) -> bool:
        """Returns whether `spec` or `xxh3` is set."""
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
    """Returns a deserializer of the class that makes messages with a frame FrameMessages."""
    arms = {
        field.number: field.name
        for oneof in message_class.DESCRIPTOR.oneofs
        for field in oneof.fields
        if field.message_type is _FRAME.DESCRIPTOR
    }
    if not arms:
        return message_class.FromString

    def deserialize(raw: bytes) -> Any:
        try:
            number, content, rest = split_field(memoryview(raw))
            if number in arms and not rest:
                return FrameMessage(arms[number], _wire_frame(content))
        except (UnusualLayout, DecodeError):
            pass  # protobuf decides, and raises where the bytes are no message
        return message_class.FromString(raw)

    return deserialize


def _wire_frame(view: memoryview) -> WireFrame:
    frame = WireFrame()
    last_number = 0
    for number, content in split_fields(view):
        if number <= last_number:
            raise UnusualLayout
        last_number = number
        if number == _FRAME.SPEC_FIELD_NUMBER:
            frame.spec = tensor_pb2.TensorSpec.FromString(bytes(content))
        elif number == _FRAME.DATA_FIELD_NUMBER:
            frame.data = content
        elif number == _FRAME.XXH3_FIELD_NUMBER:
            frame.xxh3 = bytes(content)
        else:
            raise UnusualLayout
    return frame


def field_number(message: bytes) -> int:
    """Returns the number of a message's first field, which is a oneof's arm; 0 for an empty message."""
    return message[0] >> 3 if message else 0


def frame_field(message: bytes, fields: Collection[int] = (_FRAME_FIELD,)) -> bytes | None:
    """Returns `message` if it is one of `fields`, numbers below 16, and nothing else, else `None`."""
    try:
        number, _, rest = split_field(memoryview(message))
    except UnusualLayout:
        return None
    is_short = message[0] < _CONTINUED
    return message if is_short and number in fields and not rest else None


def chunk_of(message: bytes) -> memoryview | None:
    """Returns the content of a message that is one field 2 and nothing else, uncopied, else `None`."""
    if message[:1] != _FRAME_KEY:
        return None
    try:
        _, content, rest = split_field(memoryview(message))
    except UnusualLayout:
        return None
    return None if rest else content


def indexed_frame_field(message: bytes) -> tuple[int, bytes] | None:
    """Takes an `IndexedTensorFrame` out of a message that holds nothing else.

    Returns:
        The index and the frame as field 2, or `None` for another layout.
    """
    index = 0
    try:
        _, content, rest = split_field(memoryview(message))
        if content[:1] == _INDEX_KEY:
            index, start = decode_varint(content, 1)
            content = content[start:]
    except UnusualLayout:
        return None
    frame = None if rest else frame_field(bytes(content))
    return None if frame is None else (index, frame)


def is_last_frame(frame: bytes) -> bool:
    """Returns whether a frame, as field 2, is its tensor's last: only that one carries `xxh3`."""
    try:
        _, content, _ = split_field(memoryview(frame))
        numbers = [number for number, _ in split_fields(content)]
    except UnusualLayout:
        return False
    return bool(numbers) and numbers[-1] == _FRAME.XXH3_FIELD_NUMBER


def as_negative_prompt_embedding(frame: bytes) -> bytes:
    """Makes field 2 a `DenoiseLatentsRequest` of the negative prompt's embedding."""
    return _NEGATIVE_PROMPT_EMBEDDING_KEY + frame[1:]


def as_reference_latents(index: int, frame: bytes) -> bytes:
    """Makes field 2 a `DenoiseLatentsRequest` of reference `index`'s latents."""
    return _indexed(_REFERENCE_LATENTS_KEY, index, frame)


def as_resume_latents(index: int, frame: bytes) -> bytes:
    """Makes field 2 a `DenoiseLatentsRequest` of the latents that image `index` resumes from."""
    return _indexed(_RESUME_LATENTS_KEY, index, frame)


def _indexed(key: bytes, index: int, frame: bytes) -> bytes:
    head = _INDEX_KEY + encode_varint(index) if index else b""
    return b"".join((key, encode_varint(len(head) + len(frame)), head, frame))


def as_initial_image_part(frame: bytes) -> bytes:
    """Makes a frame of `EncodeInitialImageResponse` a `DenoiseLatentsRequest` of the same tensor."""
    return _INITIAL_IMAGE_KEYS[frame[:1]] + frame[1:]


@dataclass(frozen=True)
class FileChunks:
    """A field that carries a file in chunks, one in each message."""

    field_number: int

    def messages(self, data: bytes) -> Iterator[bytes]:
        """Yields a file as serialized messages; each copies its chunk once."""
        view = memoryview(data)
        for start in range(0, len(data), _CHUNK_BYTES):
            yield b"".join(enclosed(self.field_number, [view[start : start + _CHUNK_BYTES]]))


def enclosed(field_number: int, parts: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """Makes a length-delimited field of parts that are copied only when all is joined."""
    return [encode_header(field_number, sum(map(len, parts))), *parts]
