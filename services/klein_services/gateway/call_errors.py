"""Errors of calls to the orchestrator as errors of the gateway."""

from __future__ import annotations

from http import HTTPStatus

import grpc

from klein_client import KleinError
from klein_services.gateway.errors import ApiError, FieldViolation

_STATUSES = {
    grpc.StatusCode.INVALID_ARGUMENT: HTTPStatus.BAD_REQUEST,
    grpc.StatusCode.UNAUTHENTICATED: HTTPStatus.UNAUTHORIZED,
    grpc.StatusCode.PERMISSION_DENIED: HTTPStatus.FORBIDDEN,
    grpc.StatusCode.NOT_FOUND: HTTPStatus.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION: HTTPStatus.PRECONDITION_FAILED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: HTTPStatus.TOO_MANY_REQUESTS,
    grpc.StatusCode.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: HTTPStatus.GATEWAY_TIMEOUT,
    grpc.StatusCode.CANCELLED: HTTPStatus.SERVICE_UNAVAILABLE,
}


def call_error(error: KleinError) -> ApiError:
    """Returns the error of a failed call; its reason is that of the call, else the name of its status."""
    return ApiError(
        _STATUSES.get(error.code, HTTPStatus.INTERNAL_SERVER_ERROR),
        (error.reason or error.code.name).lower(),
        error.message,
        violations=[FieldViolation(each.field, each.description) for each in error.violations],
        retry_after_seconds=error.retry_after_seconds,
    )
