"""Errors of the gateway: one exception, which each API shows in its own form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus


@dataclass(frozen=True)
class FieldViolation:
    """A field of a request, and the reason for its refusal, which follows the field's name in a sentence."""

    field: str
    message: str


class ApiError(Exception):
    """A request cannot be answered. Handlers raise it; the request's API decides how the client sees it.

    Args:
        status: HTTP status.
        reason: machine-readable word, snake_case, such as `invalid_field` or `queue_full`.
        message: one or more sentences for the client; never an exception's text.
        violations: the fields that are wrong, all of them.
        retry_after_seconds: time after which the same request may succeed; `None` when it is unknown.
    """

    def __init__(
        self,
        status: HTTPStatus,
        reason: str,
        message: str,
        *,
        violations: Sequence[FieldViolation] = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.violations = tuple(violations)
        self.retry_after_seconds = retry_after_seconds

    @property
    def field(self) -> str:
        """The first wrong field; empty when no field is."""
        return self.violations[0].field if self.violations else ""

    @property
    def headers(self) -> dict[str, str]:
        """Headers that every API sends with the error."""
        if self.retry_after_seconds is None:
            return {}
        # Whole seconds in the standard header; clients of OpenAI's API prefer the exact one.
        milliseconds = max(1, round(self.retry_after_seconds * 1000))
        return {"Retry-After": str(-(-milliseconds // 1000)), "retry-after-ms": str(milliseconds)}


def invalid_fields(violations: Sequence[FieldViolation]) -> ApiError:
    """Returns the error of a request with wrong fields."""
    message = " ".join(f"{each.field} {each.message}." for each in violations)
    return ApiError(HTTPStatus.BAD_REQUEST, "invalid_field", message, violations=violations)


def invalid_field(field: str, message: str) -> ApiError:
    """Returns the error of a request with one wrong field."""
    return invalid_fields([FieldViolation(field, message)])


def internal_error(request_id: str) -> ApiError:
    """Returns the error of a fault of the gateway; the log has the details under the request's id."""
    return ApiError(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "internal_error",
        f"The gateway failed. Its log has the cause under the request id {request_id}.",
    )
