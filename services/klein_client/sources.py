"""Image files that a request takes: paths, bytes, open files, URLs, images of Pillow, results of other requests."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias, TypeGuard

from klein_client.errors import DeadlineExceeded, InvalidRequest
from klein_client.results import Generation, Image

if TYPE_CHECKING:
    import httpx2
    from PIL.Image import Image as PilImage

ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image | PilImage"
)
"""Image file: its path, a URL (`http://`, `https://`), its content, an open file, a result, or an image of Pillow."""
FILE_BYTES = 64 << 20
"""Most bytes of an image file that the client reads or downloads; servers usually take less."""
DOWNLOAD_SECONDS = 30.0
"""Longest download of a file, within the time of its request."""
_REDIRECTS = 5
_SHOWN_CHARACTERS = 120


def listed(references: ImageSource | Sequence[ImageSource] | Generation | None) -> list[ImageSource]:
    """Returns references as a list; one alone needs no list around it."""
    if references is None:
        return []
    if isinstance(references, Generation):
        return list(references.images)
    if isinstance(references, Sequence) and not isinstance(references, str | bytes | bytearray | memoryview):
        return list(references)
    return [references]


def is_url(source: object) -> bool:
    """Returns whether a source must be downloaded."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def read_source(source: object, field: str) -> bytes:
    """Returns the image file of a source other than a URL.

    Raises:
        InvalidRequest: it cannot be read, is larger than `FILE_BYTES`, or is nothing that has an image file.
    """
    match source:
        case bytes():
            data = source
        case bytearray() | memoryview():
            data = bytes(source)
        case Image():
            if source.format == "raw":
                raise InvalidRequest.of(field, "is a raw image; ask for one in another format")
            data = source.data
        case Generation():
            if len(source) != 1:
                raise InvalidRequest.of(field, f"has {len(source)} images; give one of them")
            return read_source(source.image, field)
        case str() | os.PathLike():
            data = _read_file(source, field)
        case _ if is_pillow(source):
            data = _encoded(source, field)
        case _ if callable(read := getattr(source, "read", None)):
            content = read(FILE_BYTES + 1)
            if not isinstance(content, bytes):
                raise InvalidRequest.of(field, "is a file in text mode; open it with mode 'rb'")
            data = content
        case _:
            raise InvalidRequest.of(
                field, f"is of type {type(source).__name__}, not a path, bytes, a file, a URL or an image"
            )
    return _bounded(data, field)


def is_pillow(source: object) -> TypeGuard[PilImage]:
    """Returns whether a source is an image of Pillow, which is not imported for that."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(source, pillow.Image)


def download(url: str, field: str, deadline: float) -> bytes:
    """Downloads an image file.

    Args:
        url: of the file.
        field: of the request, for errors.
        deadline: of the request, in the time of `time.monotonic`.

    Raises:
        InvalidRequest: it cannot be downloaded, takes longer than `DOWNLOAD_SECONDS`, or is larger than `FILE_BYTES`.
        DeadlineExceeded: the request's time is over.
    """
    import httpx2

    progress = _Download(url, field, deadline)
    try:
        with (
            httpx2.Client(
                follow_redirects=True, max_redirects=_REDIRECTS, timeout=progress.remaining()
            ) as client,
            client.stream("GET", url) as response,
        ):
            progress.begin(response)
            for chunk in response.iter_bytes():
                progress.add(chunk)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise progress.failure(error) from error
    return bytes(progress.data)


async def download_async(url: str, field: str, deadline: float) -> bytes:
    """Downloads an image file like `download`, without blocking the event loop."""
    import httpx2

    progress = _Download(url, field, deadline)
    try:
        async with (
            httpx2.AsyncClient(
                follow_redirects=True, max_redirects=_REDIRECTS, timeout=progress.remaining()
            ) as client,
            client.stream("GET", url) as response,
        ):
            progress.begin(response)
            async for chunk in response.aiter_bytes():
                progress.add(chunk)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise progress.failure(error) from error
    return bytes(progress.data)


class _Download:
    """A download in progress, with its bounds."""

    def __init__(self, url: str, field: str, deadline: float) -> None:
        self.data = bytearray()
        self._url = url
        self._field = field
        self._deadline = deadline
        self._end = min(deadline, time.monotonic() + DOWNLOAD_SECONDS)

    def remaining(self) -> float:
        """Returns the time that is left; raises when none is."""
        remaining = self._end - time.monotonic()
        if remaining <= 0:
            raise self._late()
        return remaining

    def begin(self, response: httpx2.Response) -> None:
        """Checks the status of the response; raises InvalidRequest when it is no file."""
        if not response.is_success:
            raise InvalidRequest.of(
                self._field, f"{_shown(self._url)} cannot be downloaded: HTTP status {response.status_code}"
            )

    def add(self, chunk: bytes) -> None:
        """Adds received bytes; raises when there are too many, or the time is over."""
        self.remaining()
        self.data += chunk
        if len(self.data) > FILE_BYTES:
            raise _too_large(self._field)

    def failure(self, error: Exception) -> Exception:
        """Returns an error of the HTTP client as one of this client."""
        if time.monotonic() >= self._end:
            return self._late()
        text = str(error) or type(error).__name__
        return InvalidRequest.of(self._field, f"{_shown(self._url)} cannot be downloaded: {text}")

    def _late(self) -> Exception:
        if time.monotonic() >= self._deadline:
            return DeadlineExceeded(f"the timeout passed while {self._field} was downloaded")
        return InvalidRequest.of(
            self._field, f"{_shown(self._url)} cannot be downloaded within {DOWNLOAD_SECONDS:g} s"
        )


def _read_file(path: str | os.PathLike[str], field: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(FILE_BYTES + 1)
    except OSError as error:
        raise InvalidRequest.of(field, f"{_shown(path)} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InvalidRequest.of(field, f"{_shown(path)} is no path: {error}") from error


def _encoded(image: PilImage, field: str) -> bytes:
    """Returns an image of Pillow as a PNG file."""
    file = BytesIO()
    try:
        (image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA") else image.convert("RGB")).save(
            file, "PNG", compress_level=1
        )
    except (OSError, ValueError) as error:
        raise InvalidRequest.of(field, f"cannot be encoded: {error}") from error
    return file.getvalue()


def _bounded(data: bytes, field: str) -> bytes:
    if len(data) > FILE_BYTES:
        raise _too_large(field)
    return data


def _too_large(field: str) -> InvalidRequest:
    return InvalidRequest.of(field, f"has more than {FILE_BYTES} bytes")


def _shown(source: str | os.PathLike[str]) -> str:
    text = os.fspath(source)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
