"""Images of requests that make jobs: files that were uploaded before, else all that downloads can read."""

from __future__ import annotations

import re
from http import HTTPStatus

from klein_services.gateway.downloads import Downloads
from klein_services.gateway.errors import ApiError, FieldViolation, invalid_fields
from klein_services.gateway.jobs import Jobs

UPLOADS_PATH = "/v1/files"
"""Path of uploaded files; a URL of this gateway under it is read from the database, not over the network."""
_UPLOAD = re.compile(r"/([0-9a-f]{26})")
_URL = re.compile(r"https?://", re.IGNORECASE)
_SHOWN_CHARACTERS = 64


class InputImages:
    """Reader of the images of one request.

    Args:
        jobs: has the uploaded files.
        downloads: reads all other images.
        owner: key of the request.
        base_url: URL of this gateway, as the client reaches it.
        limit_bytes: most bytes of one image for the model; 0 is no limit of its own.
    """

    def __init__(
        self, jobs: Jobs, downloads: Downloads, *, owner: str, base_url: str, limit_bytes: int
    ) -> None:
        self._jobs = jobs
        self._downloads = downloads
        self._owner = owner
        self._uploads_url = base_url + UPLOADS_PATH
        self._limit_bytes = limit_bytes

    async def read(self, value: str, field: str) -> bytes:
        """Returns the bytes of an image.

        Raises:
            ApiError: the value stands for no image, or for one that is too large; the error names the field.
        """
        upload = _UPLOAD.fullmatch(value.removeprefix(self._uploads_url))
        if upload and value.startswith(self._uploads_url):
            with self._jobs.uploads() as uploads:
                data = self._downloads.checked(await uploads.content(self._owner, upload[1]), field)
        else:
            try:
                data = await self._downloads.image(value, field)
            except ApiError as error:
                if error.status == HTTPStatus.BAD_REQUEST:
                    error.status = HTTPStatus.UNPROCESSABLE_ENTITY
                raise
        if 0 < self._limit_bytes < len(data):
            message = f"has {len(data)} bytes; the model takes {self._limit_bytes}"
            refusal = invalid_fields([FieldViolation(field, message)])
            refusal.status = HTTPStatus.UNPROCESSABLE_ENTITY
            raise refusal
        return data


def shown(value: object) -> object:
    """Returns an image of a request as answers repeat it: a URL as it is, data by the length of its text."""
    if isinstance(value, list):
        return [shown(each) for each in value]
    if not isinstance(value, str) or _URL.match(value) or len(value) <= _SHOWN_CHARACTERS:
        return value
    return f"data of {len(value)} characters"
