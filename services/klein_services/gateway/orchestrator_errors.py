"""Errors of the orchestrator as HTTP errors."""

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
    FailedPrecondition: HTTPStatus.UNPROCESSABLE_ENTITY,
    Overloaded: HTTPStatus.TOO_MANY_REQUESTS,
    DeadlineExceeded: HTTPStatus.GATEWAY_TIMEOUT,
    Unauthenticated: HTTPStatus.UNAUTHORIZED,
    PermissionDenied: HTTPStatus.FORBIDDEN,
    Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    Cancelled: HTTPStatus.SERVICE_UNAVAILABLE,
}


def api_error(error: KleinError, fields: Mapping[str, str]) -> ApiError:
    """Returns a failed call of the orchestrator as an HTTP error.

    Args:
        error: of the client.
        fields: field of an API → argument of the client that it becomes, without an index, where the names differ.
    """
    if isinstance(error, InternalError):
        return internal_error(error.error_id or request_id.get())
    status = next((status for kind, status in _STATUSES.items() if isinstance(error, kind)), None)
    if status is None:
        return internal_error(request_id.get())
    names = {argument: field for field, argument in fields.items()}
    violations = []
    for violation in error.violations:
        name, bracket, index = violation.argument.partition("[")
        violations.append(FieldViolation(names.get(name, name) + bracket + index, violation.description))
    message = " ".join(f"{each.field} {each.message}." for each in violations) or error.message
    retry_after = error.retry_after_seconds
    if isinstance(error, Unavailable | Cancelled) and retry_after is None:
        retry_after = LOST_SECONDS
    if isinstance(error, Unavailable) and not error.reason:
        # The original names the address of the orchestrator, which is no client's business.
        message = "The orchestrator does not answer, or one of its stages is gone."
    reason = (error.reason or error.code.name).lower()
    return ApiError(
        status,
        "invalid_field" if violations else reason,
        message,
        violations=violations,
        retry_after_seconds=retry_after,
    )
