"""Image files that clients send: their field, digest and media type, without decoding them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from klein_services.orchestrator.masked_edit import MaskedEdit

INITIAL_IMAGE_FIELD = "initial_image"
_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"BM", "image/bmp"),
)


@dataclass(frozen=True)
class InputImage:
    """An image file of a request."""

    field: str
    """Name of its field in the request: `initial_image`, `mask` or `references[0]` and so on."""
    data: bytes

    @cached_property
    def sha256(self) -> bytes:
        """The file's digest. Computed once; slow for large files, so read it off the event loop first."""
        return hashlib.sha256(self.data).digest()

    @property
    def media_type(self) -> str:
        """The media type that the file's first bytes claim; empty when it is none that the suite takes."""
        if self.data[:4] == b"RIFF" and self.data[8:12] == b"WEBP":
            return "image/webp"
        return next((name for begin, name in _SIGNATURES if self.data.startswith(begin)), "")


def input_images(edit: MaskedEdit | None, references: tuple[bytes, ...]) -> tuple[InputImage, ...]:
    """Returns a request's files: the initial image, its mask, the references."""
    painted = [] if edit is None else [InputImage(INITIAL_IMAGE_FIELD, edit.initial_image)]
    if edit is not None and edit.mask is not None:
        painted.append(InputImage("mask", edit.mask))
    return (*painted, *(InputImage(f"references[{index}]", data) for index, data in enumerate(references)))
