"""Keeps what a status says within the headers that it travels in.

A caller's gRPC takes 8 KiB of them for certain and 16 KiB at most; with more, the caller gets RESOURCE_EXHAUSTED in
place of the status. The message travels twice, percent-encoded and within the details, and some peers encode
the details in base64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from klein_core.errors import Violation

MESSAGE_BYTES = 1024
"""Most bytes of a status' message, percent-encoded."""
VIOLATIONS_BYTES = 2560
"""Most bytes of all violations together."""
INFO_VALUE_BYTES = 512
"""Most bytes of a value in an ErrorInfo, percent-encoded."""
_FIELD_BYTES = 192
_DESCRIPTION_BYTES = 512
_CUT = "…"


def shortened(text: str, limit_bytes: int) -> str:
    """Returns a text, cut off with an ellipsis where it would take more than `limit_bytes` percent-encoded."""
    if _encoded_bytes(text[: limit_bytes + 1]) <= limit_bytes:
        return text
    room = limit_bytes - _encoded_bytes(_CUT)
    end = 0
    while room >= (width := _encoded_bytes(text[end])):
        room -= width
        end += 1
    return text[:end] + _CUT


def told(violations: Sequence[Violation]) -> Iterator[Violation]:
    """Yields as many violations as fit; where some do not, one more says how many."""
    room = VIOLATIONS_BYTES
    for index, violation in enumerate(violations):
        shown = Violation(
            shortened(violation.field, _FIELD_BYTES), shortened(violation.description, _DESCRIPTION_BYTES)
        )
        room -= len(shown.field.encode()) + len(shown.description.encode())
        if room < 0:
            rest = len(violations) - index
            yield Violation(shown.field, f"is wrong, too: {rest} more violations are not listed")
            return
        yield shown


def _encoded_bytes(text: str) -> int:
    """Returns how many bytes a text takes percent-encoded, as gRPC sends it: printable ASCII but `%` takes one each."""
    return sum(1 if 0x20 <= byte <= 0x7E and byte != ord("%") else 3 for byte in text.encode())
