"""Downloads: references that clients give as a URL, a `data:` URL or base64."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass

from klein_services.gateway.errors import invalid_field
from klein_services.gateway.outbound import Outbound, OutboundError

_DATA_URL = re.compile(r"data:[\w.+/-]*(?:;[\w.=+-]+)*;base64,", re.ASCII | re.IGNORECASE)
_WHITE_SPACE = re.compile(r"[ \t\r\n]+")
_SIGNATURES = {
    "image/png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "image/jpeg": re.compile(rb"\xff\xd8\xff"),
    "image/webp": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
}
ACCEPTED = "PNG, JPEG or WebP"


@dataclass(frozen=True)
class Downloads:
    """Reader of image files that a request names or contains.

    Args:
        outbound: makes the requests.
        seconds: bound of one download.
        maximum_bytes: bound of one file.
    """

    outbound: Outbound
    seconds: float
    maximum_bytes: int

    async def image(self, text: str, field: str) -> bytes:
        """Returns the image file that a text stands for: `http(s)://…`, `data:…;base64,…`, or base64.

        Raises:
            ApiError: it stands for none; the error names the field.
        """
        if re.match(r"https?://", text, re.IGNORECASE):
            return self.checked(await self._download(text, field), field)
        if match := _DATA_URL.match(text):
            return self.checked(self._decoded(text[match.end() :], field), field)
        if re.match(r"[\w+.-]{2,16}:", text):
            raise invalid_field(
                field, "must be an http:// or https:// URL, a data: URL with base64, or base64"
            )
        return self.checked(self._decoded(text, field), field)

    def checked(self, data: bytes, field: str) -> bytes:
        """Returns a file's bytes when they are few enough and begin as an image file does; only stages decode them.

        Raises:
            ApiError: they are not; the error names the field.
        """
        if len(data) > self.maximum_bytes:
            raise invalid_field(field, f"has {len(data)} bytes; at most {self.maximum_bytes} are allowed")
        if not image_type(data):
            raise invalid_field(field, f"is no image file; it must be {ACCEPTED}")
        return data

    async def _download(self, url: str, field: str) -> bytes:
        try:
            answer = await self.outbound.send(
                "GET", url, seconds=self.seconds, maximum_bytes=self.maximum_bytes
            )
        except OutboundError as error:
            raise invalid_field(field, f"cannot be downloaded: {error}") from None
        if answer.status != 200:
            raise invalid_field(field, f"cannot be downloaded: its server answers {answer.status}")
        return answer.body

    def _decoded(self, text: str, field: str) -> bytes:
        compact = _WHITE_SPACE.sub("", text)
        # Before decoding, which would need as much memory again.
        if len(compact) > self.maximum_bytes // 3 * 4 + 4:
            raise invalid_field(field, f"has more than the allowed {self.maximum_bytes} bytes")
        try:
            return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise invalid_field(field, "is no base64") from None


def image_type(data: bytes) -> str:
    """Returns the media type of an image file by its first bytes; empty when it is none of those accepted."""
    return next((kind for kind, signature in _SIGNATURES.items() if signature.match(data)), "")
