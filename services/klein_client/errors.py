"""Errors of the client: a tree of exceptions, made from gRPC statuses with their details."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

ARGUMENTS = {
    "width_px": "width",
    "height_px": "height",
    "step_count": "steps",
    "image_count": "count",
    "mask_padding_px": "mask_padding",
    "preview_interval_steps": "preview_interval",
    "idempotency-key": "idempotency_key",
}
"""Arguments of `generate` whose fields of the API have another name."""
_INDEX = re.compile(r"[\[.]")


@dataclass(frozen=True)
class Violation:
    """Field of a request that breaks a rule of the server."""

    field: str
    """Name in the API, such as `width_px` or `references[1]`."""
    description: str
    """Reason, which follows the field's name in a sentence: `is 70; it must be a multiple of 16`."""

    @property
    def argument(self) -> str:
        """Returns the argument of `generate` that the field comes from, with its index: `references[1]`."""
        field = self.field.removeprefix("spec.")
        name = _INDEX.split(field, maxsplit=1)[0]
        return ARGUMENTS.get(name, name) + field[len(name) :]

    def __str__(self) -> str:
        return f"{self.argument} {self.description}"


class KleinError(Exception):
    """A call that failed.

    Args:
        message: of the server, or of this client.
        code: the gRPC status; `UNKNOWN` for errors that no server sent.
        reason: word that names the cause for programs, such as `QUEUE_FULL`; empty without one.
        violations: fields that break rules.
        retry_after_seconds: time after which the server recommends another attempt; `None` without such advice.
        metadata: further facts by name, such as `quota` or `error_id`.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: str = "",
        violations: Sequence[Violation] = (),
        retry_after_seconds: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.violations = tuple(violations)
        self.retry_after_seconds = retry_after_seconds
        self.metadata = dict(metadata or {})


class InvalidRequest(KleinError):
    """The request breaks limits; `violations` has every field. The same request fails again."""

    def __str__(self) -> str:
        return "; ".join(map(str, self.violations)) or self.message

    @classmethod
    def of(cls, field: str, description: str) -> InvalidRequest:
        """Returns the error of one field that this client found, before any call."""
        violation = Violation(field, description)
        return cls(str(violation), code=grpc.StatusCode.INVALID_ARGUMENT, violations=[violation])


class NotFound(KleinError):
    """The server has no model or adapter of that name; the message lists those that it has."""


class FailedPrecondition(KleinError):
    """The server's operator has something to repair, for example the file of an adapter."""


class Overloaded(KleinError):
    """The server has no room: its queue is full, the deadline too short, or a quota used up; `reason` has which.

    `retry_after_seconds` is `None` where waiting does not help.
    """


class DeadlineExceeded(KleinError):
    """The time of the call was over before its result was there."""


class Unauthenticated(KleinError):
    """The server wants a token, or does not know the one that it got."""


class PermissionDenied(KleinError):
    """The token does not allow it, or the content policy denies it (`reason` `CONTENT_DENIED`)."""


class Unavailable(KleinError):
    """No server answers, the one that does is no klein orchestrator, or a stage of it is gone."""


class WrongServer(Unavailable):
    """The server at the address is not a klein orchestrator."""


class Cancelled(KleinError):
    """The call was cancelled, by closing it or its client, or by the server."""


class InternalError(KleinError):
    """A fault of the server; its log has the cause under `error_id`."""

    @property
    def error_id(self) -> str:
        """Returns the id in the server's log; empty when the server gave none."""
        return self.metadata.get("error_id", "")


class UnusableClient(KleinError):
    """The client is closed, or belongs to another process or event loop."""


_TYPES: Mapping[grpc.StatusCode, type[KleinError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.UNIMPLEMENTED: WrongServer,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.INTERNAL: InternalError,
}


def call_error(error: grpc.RpcError, target: str, server: str = "klein orchestrator") -> KleinError:
    """Returns a failed call's status as an error of the client.

    Args:
        error: the failed call; of grpc or of grpc.aio.
        target: the server that was called, for the message.
        server: what it should be, for the message.
    """
    code, message = error.code(), error.details() or ""
    violations: list[Violation] = []
    reason, metadata, retry_after = "", {}, None
    for detail in _details(error):
        if isinstance(detail, error_details_pb2.BadRequest):
            violations += [Violation(item.field, item.description) for item in detail.field_violations]
        elif isinstance(detail, error_details_pb2.ErrorInfo):
            reason, metadata = str(detail.reason), dict(detail.metadata)
        elif isinstance(detail, error_details_pb2.RetryInfo):
            retry_after = detail.retry_delay.ToTimedelta().total_seconds()
    kind = _TYPES.get(code, KleinError)
    if kind is Overloaded and "larger than max" in message:
        kind = InvalidRequest
        message = f"the files of the request are larger than the server takes ({message})"
    elif kind is WrongServer:
        message = f"the server at {target} is not a {server}: {message}"
    elif kind is Unavailable and not reason:
        message = f"no {server} answers at {target}: {message}"
    elif kind is DeadlineExceeded and not reason:
        message = f"the call to {target} took longer than its timeout"
    return kind(
        message or code.name,
        code=code,
        reason=reason,
        violations=violations,
        retry_after_seconds=retry_after,
        metadata=metadata,
    )


def _details(error: grpc.RpcError) -> Iterable[object]:
    """Yields the details of a status that this client understands."""
    try:
        status = rpc_status.from_call(error)
    except (DecodeError, ValueError):
        # Servers other than the suite's, such as proxies, send what they like.
        return
    for packed in status.details if status else ():
        for kind in (error_details_pb2.BadRequest, error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo):
            if packed.Is(kind.DESCRIPTOR):
                message = kind()
                packed.Unpack(message)
                yield message
