"""Requests that make jobs: the parts that the APIs with jobs have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request

from klein_client import Model
from klein_services.gateway.api_key import api_key, caller_of
from klein_services.gateway.gateway import Gateway, gateway_of
from klein_services.gateway.input_images import InputImages
from klein_services.gateway.job import Job, NewJob, Webhook
from klein_services.gateway.jobs import Jobs, new_seed
from klein_services.gateway.json_fields import JsonFields

IDEMPOTENCY_HEADER = "idempotency-key"
MAXIMUM_KEY_CHARACTERS = 200
MAXIMUM_PROMPT_CHARACTERS = 32768
MAXIMUM_URL_CHARACTERS = 2083
MAXIMUM_SECRET_CHARACTERS = 256


class JobRequest:
    """A request that makes a job, or asks for one.

    Args:
        request: of the client.
        api: API of the job.
    """

    def __init__(self, request: Request, api: str) -> None:
        self._gateway: Gateway = gateway_of(request)
        self.api = api
        self.key = api_key(request)
        self.owner = caller_of(request)
        self.base_url = self._gateway.url(request, "")
        self._idempotency_key = request.headers.get(IDEMPOTENCY_HEADER)

    @property
    def jobs(self) -> Jobs:
        """Jobs of the gateway."""
        return self._gateway.jobs

    def admit(self) -> None:
        """Counts the request for the rate limit of its key.

        Raises:
            ApiError: the key has made too many.
        """
        self._gateway.limits.admit(self.owner)

    def images(self, model: Model) -> InputImages:
        """Returns the reader of the request's images."""
        return InputImages(
            self.jobs,
            self._gateway.downloads,
            owner=self.owner,
            base_url=self.base_url,
            limit_bytes=model.limits.reference_bytes,
        )

    def check_key(self, fields: JsonFields) -> None:
        """Checks the idempotency key, which is a header."""
        key = self._idempotency_key
        if key is not None and not 0 < len(key) <= MAXIMUM_KEY_CHARACTERS:
            fields.refuse(IDEMPOTENCY_HEADER, f"must have 1 to {MAXIMUM_KEY_CHARACTERS} characters")

    async def submit(
        self,
        values: Mapping[str, Any],
        echo: Mapping[str, Any],
        *,
        files: Sequence[bytes] = (),
        webhook: Webhook | None = None,
        idempotency_key: str | None = None,
    ) -> tuple[Job, bool]:
        """Makes the job.

        Args:
            values: parameters of the images; those that are `None` are left to the server.
            echo: values that answers repeat.
            files: images that `values` names by their position.
            webhook: receiver of the job's events.
            idempotency_key: in place of the header's.

        Raises:
            ApiError: there is no place for it, or the idempotency key belongs to another request.
        """
        parameters = {name: value for name, value in values.items() if value is not None}
        # Drawn once and kept: every run of the job makes the same images.
        parameters.setdefault("seed", new_seed())
        if files:
            parameters.setdefault("references", list(range(len(files))))
        new = NewJob(
            owner=self.owner,
            api=self.api,
            request=parameters,
            echo=dict(echo) | {"base_url": self.base_url},
            files=files,
            idempotency_key=idempotency_key or self._idempotency_key,
            webhook=webhook,
            credential=self.jobs.secret.seal(self.key) if self.key else None,
        )
        return await self.jobs.submit(new)


def read_webhook_url(fields: JsonFields, name: str) -> str | None:
    """Returns the URL of a webhook; its host is looked up when it is called, because names change their addresses."""
    url = fields.text(name, limit=MAXIMUM_URL_CHARACTERS)
    if url is None:
        return None
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme not in ("http", "https") or not host or port == 0:
        fields.refuse(name, "must be an http or https URL")
    elif parts.username or parts.password:
        fields.refuse(name, "must not hold a user or a password")
    elif not url.isascii() or any(character <= " " for character in url):
        fields.refuse(name, "must be ASCII without spaces; encode other characters")
    else:
        return url
    return None


def fit_size(aspect: tuple[int, int], megapixels: float) -> tuple[int, int]:
    """Returns the multiples of 16 that are nearest to an aspect and a number of 2^20 pixels."""
    across, down = aspect
    height = (megapixels * 2**20 * down / across) ** 0.5
    width = height * across / down
    return max(64, round(width / 16) * 16), max(64, round(height / 16) * 16)
