"""Checksums of the messages between the orchestrator and the stages, which only TLS would protect otherwise.

A bit that flips between two machines may change a prompt or a pixel without breaking gRPC's framing. So each message
begins with a field of its own: a key that no message of `klein_api` has, and XXH3 of everything after it. Receivers
without this module skip it as an unknown field. Frames of large tensors have none, because a tensor has its digest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError
from xxhash import xxh3_64_digest

FIELD_NUMBER = 15
"""Field of the checksum, 64 bits of fixed length."""
SMALL_BYTES = 64 << 10
"""Frames of tensors up to this size have a checksum, too: it also covers their index, and costs little."""
_KEY = bytes([FIELD_NUMBER << 3 | 1])
_HEADER_BYTES = 9


class DamagedMessage(DecodeError):
    """A message is not what was sent."""


def with_checksum(message: bytes) -> bytes:
    """Returns a serialized message with its checksum."""
    return b"".join((_KEY, xxh3_64_digest(message), message))


def without_checksum(message: bytes) -> bytes:
    """Returns a serialized message without its checksum, if it has one.

    Raises:
        DamagedMessage: the checksum is not that of the message.
    """
    if message[:1] != _KEY:
        return message
    content = message[_HEADER_BYTES:]
    if message[1:_HEADER_BYTES] != xxh3_64_digest(content):
        raise DamagedMessage("the message is not what was sent: its bytes do not match its checksum")
    return content


def frame_with_checksum(message: bytes) -> bytes:
    """Returns a serialized message that carries a tensor's frame, with its checksum unless it is large."""
    return with_checksum(message) if len(message) <= SMALL_BYTES else message


def checking(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Returns a deserializer of messages that may have a checksum."""
    return lambda message: deserialize(without_checksum(message))


def adding_checksums(serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """Returns a serializer that adds checksums; `serialize` returns frames of tensors as they are."""

    def serialize_with_checksum(message: Any) -> bytes:
        serialized = serialize(message)
        return frame_with_checksum(serialized) if serialized is message else with_checksum(serialized)

    return serialize_with_checksum
