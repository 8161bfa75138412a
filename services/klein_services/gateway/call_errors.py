"""Errors of calls to the orchestrator as errors of the gateway, the same for every API."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

from klein_client import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidRequest,
    KleinError,
    NotFound,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from klein_services.gateway.errors import ApiError, FieldViolation, internal_error
from klein_services.runtime.logs import request_id

LOST_SECONDS = 2.0
"""Retry time of a request whose orchestrator is not there, or loads."""
_STATUSES: Mapping[type[KleinError], HTTPStatus] = {
    InvalidRequest: HTTPStatus.BAD_REQUEST,
    NotFound: HTTPStatus.NOT_FOUND,
    # Not 412, which belongs to headers such as If-Match.
    FailedPrecondition: HTTPStatus.UNPROCESSABLE_ENTITY,
    Overloaded: HTTPStatus.TOO_MANY_REQUESTS,
    DeadlineExceeded: HTTPStatus.GATEWAY_TIMEOUT,
    Unauthenticated: HTTPStatus.UNAUTHORIZED,
    PermissionDenied: HTTPStatus.FORBIDDEN,
    Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    Cancelled: HTTPStatus.SERVICE_UNAVAILABLE,
}


def call_error(error: KleinError, fields: Mapping[str, str] | None = None) -> ApiError:
    """Returns a failed call as an error of the gateway, which each API shows in its own form.

    Args:
        error: of the client.
        fields: field of an API → argument of the client that it becomes, without an index, where the names differ;
            `None` for an API whose fields have the names of the gRPC API.
    """
    if isinstance(error, InternalError):
        return internal_error(error.error_id or request_id.get())
    status = next((status for kind, status in _STATUSES.items() if isinstance(error, kind)), None)
    if status is None:
        return internal_error(request_id.get())
    names = {argument: field for field, argument in (fields or {}).items()}
    violations = []
    for violation in error.violations:
        shown = violation.field.removeprefix("spec.")
        if fields is not None:
            name, bracket, index = violation.argument.partition("[")
            shown = names.get(name, name) + bracket + index
        violations.append(FieldViolation(shown, violation.description))
    message = " ".join(f"{each.field} {each.message}." for each in violations) or error.message
    retry_after = error.retry_after_seconds
    if isinstance(error, Unavailable | Cancelled) and retry_after is None:
        retry_after = LOST_SECONDS
    if isinstance(error, Unavailable) and not error.reason:
        # The original names the address of the orchestrator, which is no client's business.
        message = "The orchestrator does not answer, or one of its stages is gone."
    return ApiError(
        status,
        "invalid_field" if violations else (error.reason or error.code.name).lower(),
        message,
        violations=violations,
        retry_after_seconds=retry_after,
    )
