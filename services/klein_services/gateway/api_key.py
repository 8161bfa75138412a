"""Key of a caller: the token of the suite, in any of the headers that the served APIs use."""

from __future__ import annotations

import hashlib
import re
from http import HTTPStatus

from starlette.requests import Request

from klein_services.gateway.errors import ApiError

_SCHEMES = ("bearer", "key", "token")
"""Schemes of `Authorization` that clients of the served APIs send."""
_HEADERS = ("x-key", "x-api-key")
_KEY = re.compile(r"[!-~]{1,4096}")


def api_key(request: Request) -> str:
    """Returns the key of a request, empty without one; the orchestrator decides whether it needs one.

    Raises:
        ApiError: a header holds text that cannot be a key. It is not shown.
    """
    scheme, _, rest = request.headers.get("authorization", "").partition(" ")
    if scheme and scheme.lower() not in _SCHEMES:
        raise _unusable("Authorization must be `Bearer KEY`")
    candidates = [rest.strip(), *(request.headers.get(name, "").strip() for name in _HEADERS)]
    key = next((each for each in candidates if each), "")
    if key and not _KEY.fullmatch(key):
        raise _unusable("the key has characters that no key has, or more than 4096")
    return key


def caller_of(request: Request) -> str:
    """Returns the one that limits and totals count for: a digest of the key, else the client's address."""
    if key := api_key(request):
        return "key-" + hashlib.sha256(key.encode("ascii")).hexdigest()[:16]
    return request.client.host if request.client else "unknown"


def _unusable(reason: str) -> ApiError:
    return ApiError(HTTPStatus.UNAUTHORIZED, "invalid_api_key", f"No usable API key: {reason}.")
