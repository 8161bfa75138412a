"""Bodies of requests: read within bounds of bytes and time, parsed as JSON or as a form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

from starlette.datastructures import FormData
from starlette.formparsers import FormParser, MultiPartException, MultiPartParser
from starlette.requests import Request

from klein_services.gateway import metrics
from klein_services.gateway.errors import ApiError, invalid_field
from klein_services.gateway.settings import GatewaySettings

MIB = 1 << 20
MAXIMUM_JSON_DEPTH = 32
MAXIMUM_FORM_FIELDS = 100
MAXIMUM_FORM_FILES = 32
_BUSY_SECONDS = 1.0
"""Retry time of a request that finds the memory for bodies in use."""


class BodyReader:
    """Reader of all bodies; it bounds each of them and their sum.

    Args:
        settings: the bounds.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self._limit = settings.body_limit_mib * MIB
        self._memory = settings.body_memory_mib * MIB
        self._seconds = settings.body_timeout_seconds
        self._held = 0

    @asynccontextmanager
    async def json(self, request: Request) -> AsyncIterator[dict[str, Any]]:
        """Reads a JSON object; its bytes count against the memory of all bodies until the block ends.

        Raises:
            ApiError: the body is too large, too slow, no JSON object, nested deeper than `MAXIMUM_JSON_DEPTH`, or has
                NaN, infinity or a name twice.
        """
        _require_type(request, "application/json")
        async with self._received(request) as chunks:
            yield parse_json_object(b"".join(chunks))

    @asynccontextmanager
    async def form(self, request: Request) -> AsyncIterator[FormData]:
        """Reads a form, `multipart/form-data` or URL-encoded, likewise; files are closed when the block ends.

        Raises:
            ApiError: the body is too large, too slow, or no such form.
        """
        kind = _require_type(request, "multipart/form-data", "application/x-www-form-urlencoded")
        async with self._received(request) as chunks:

            async def stream() -> AsyncIterator[bytes]:
                for chunk in chunks:
                    yield chunk

            try:
                if kind == "multipart/form-data":
                    form = await MultiPartParser(
                        request.headers,
                        stream(),  # type: ignore[arg-type]  # annotated as a generator, read as an iterator
                        max_files=MAXIMUM_FORM_FILES,
                        max_fields=MAXIMUM_FORM_FIELDS,
                        max_part_size=self._limit,
                    ).parse()
                else:
                    form = await FormParser(
                        request.headers,
                        stream(),  # type: ignore[arg-type]  # likewise
                        max_fields=MAXIMUM_FORM_FIELDS,
                        max_part_size=self._limit,
                    ).parse()
            except MultiPartException as error:
                raise ApiError(
                    HTTPStatus.BAD_REQUEST, "invalid_body", f"The form cannot be read: {error.message}"
                ) from None
            try:
                yield form
            finally:
                await form.close()

    @asynccontextmanager
    async def _received(self, request: Request) -> AsyncIterator[list[bytes]]:
        """Receives a body; it is counted while the block runs."""
        counted = 0
        try:
            declared = request.headers.get("content-length", "0")
            if declared.isdecimal() and int(declared) > self._limit:
                raise self._too_large()
            chunks: list[bytes] = []
            try:
                async with asyncio.timeout(self._seconds):
                    async for chunk in request.stream():
                        counted += len(chunk)
                        self._count(len(chunk))
                        if counted > self._limit:
                            raise self._too_large()
                        if self._held > self._memory:
                            raise ApiError(
                                HTTPStatus.SERVICE_UNAVAILABLE,
                                "bodies_full",
                                "The bodies of requests in progress fill the gateway's memory for them.",
                                retry_after_seconds=_BUSY_SECONDS,
                            )
                        chunks.append(chunk)
            except TimeoutError:
                raise ApiError(
                    HTTPStatus.REQUEST_TIMEOUT,
                    "body_timeout",
                    f"The body did not arrive within {self._seconds:g} s.",
                ) from None
            yield chunks
        finally:
            self._count(-counted)

    def _count(self, byte_count: int) -> None:
        self._held += byte_count
        metrics.BODY_BYTES.set(self._held)

    def _too_large(self) -> ApiError:
        return ApiError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            "body_too_large",
            f"The body has more than {self._limit // MIB} MiB, which is the limit.",
        )


def parse_json_object(body: bytes) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
        ApiError: the body is none; see `BodyReader.json`.
    """
    try:
        value = json.loads(body, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else _reason(error)
        raise _not_json(reason) from None
    if not isinstance(value, dict):
        raise _not_json("it is no object")
    _check_depth(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise invalid_field(next(name for name in names if names.count(name) > 1), "is there twice")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _check_depth(value: object) -> None:
    level: list[object] = [value]
    for _ in range(MAXIMUM_JSON_DEPTH):
        level = [
            child
            for each in level
            if isinstance(each, dict | list)
            for child in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise _not_json(f"it is nested deeper than {MAXIMUM_JSON_DEPTH}")


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos}"
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def _not_json(reason: str) -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, "invalid_body", f"The body must be a JSON object: {reason}.")


def _require_type(request: Request, *allowed: str) -> str:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in allowed:
        shown = f"{kind[:80]!r}" if kind else "missing"
        raise ApiError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "unsupported_content_type",
            f"Content-Type must be {' or '.join(allowed)}; it is {shown}.",
        )
    return kind
