"""OpenAI's images API: the form of its errors."""

from __future__ import annotations

from typing import Any

from klein_services.gateway.errors import ApiError
from klein_services.gateway.route_group import RouteGroup


def error_body(error: ApiError) -> dict[str, Any]:
    """Returns an error in OpenAI's form; `param` is the first wrong field."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    if error.status in (401, 403):
        kind = "authentication_error" if error.status == 401 else "permission_error"
    if error.status == 429:
        kind = "rate_limit_error"
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.field or None,
            "code": error.reason,
        }
    }


GROUP = RouteGroup("openai", [], error_body)
