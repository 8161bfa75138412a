"""gRPC statuses of errors, and what clients read from them.

| error | code | details |
|---|---|---|
| InvalidInput | INVALID_ARGUMENT | BadRequest with every violation |
| UndecodableMessage | INVALID_ARGUMENT | BadRequest with the field `request`, ErrorInfo UNDECODABLE_MESSAGE |
| Unauthenticated | UNAUTHENTICATED | ErrorInfo UNAUTHENTICATED |
| PermissionDenied | PERMISSION_DENIED | ErrorInfo MODEL_NOT_ALLOWED, METHOD_NOT_ALLOWED or UNKNOWN_PEER |
| QuotaExceeded | RESOURCE_EXHAUSTED | ErrorInfo QUOTA_EXCEEDED; RetryInfo, unless the request can never pass |
| UnknownModel | NOT_FOUND | BadRequest with the field, ErrorInfo UNKNOWN_MODEL |
| UnknownAdapter | NOT_FOUND | BadRequest with the field, ErrorInfo UNKNOWN_ADAPTER |
| UnusableAdapter | FAILED_PRECONDITION | BadRequest with the field, ErrorInfo UNUSABLE_ADAPTER |
| AdapterMemoryFull | RESOURCE_EXHAUSTED | ErrorInfo ADAPTER_MEMORY_FULL, RetryInfo |
| QueueFull | RESOURCE_EXHAUSTED | ErrorInfo QUEUE_FULL, RetryInfo |
| DeviceOutOfMemory | RESOURCE_EXHAUSTED | ErrorInfo OUT_OF_MEMORY, RetryInfo |
| DeadlineUnreachable | RESOURCE_EXHAUSTED | ErrorInfo DEADLINE_UNREACHABLE |
| DeadlinePassed | DEADLINE_EXCEEDED | ErrorInfo DEADLINE_PASSED |
| ReceiveTimeout | DEADLINE_EXCEEDED | ErrorInfo RECEIVE_TIMEOUT |
| StageUnavailable | UNAVAILABLE | ErrorInfo STAGE_UNAVAILABLE |
| StagesLost | UNAVAILABLE, without retries by gRPC | ErrorInfo STAGE_UNAVAILABLE |
| DeviceFault | UNAVAILABLE, without retries by gRPC | ErrorInfo DEVICE_FAULT; the process ends and is replaced |
| ContentDenied | PERMISSION_DENIED | ErrorInfo CONTENT_DENIED with the policy's reason code |
| ContentPolicyFailed | UNAVAILABLE, without retries by gRPC | ErrorInfo CONTENT_POLICY_FAILED |
| PeerFailure | the other server's | the other server's |
| anything else | INTERNAL | ErrorInfo INTERNAL_ERROR with an id that the log has too |

Messages, violations and metadata are cut off so that every status fits into HTTP/2 headers (8 KiB by default).
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from klein_core.errors import DeviceFault, InvalidInput, Violation
from klein_services.runtime.errors import (
    AdapterMemoryFull,
    ContentDenied,
    ContentPolicyFailed,
    DeadlinePassed,
    DeadlineUnreachable,
    DeviceOutOfMemory,
    PermissionDenied,
    QueueFull,
    QuotaExceeded,
    ReceiveTimeout,
    ServiceError,
    StagesLost,
    StageUnavailable,
    Unauthenticated,
    UndecodableMessage,
    UnknownAdapter,
    UnknownModel,
    UnusableAdapter,
)

DOMAIN = "klein-suite"
"""`ErrorInfo.domain` of every status made here."""
DEVICE_FAULT = "DEVICE_FAULT"
"""`ErrorInfo.reason` of an UNAVAILABLE whose server has lost its device."""
UNKNOWN_ADAPTER = "UNKNOWN_ADAPTER"
"""`ErrorInfo.reason` of a NOT_FOUND that is about an adapter."""
CONTENT_DENIED = "CONTENT_DENIED"
"""`ErrorInfo.reason` of a PERMISSION_DENIED by the content policy, which another token would not change."""
CONTENT_POLICY_FAILED = "CONTENT_POLICY_FAILED"
"""`ErrorInfo.reason` of an UNAVAILABLE whose content policy gave no decision."""
_NO_RETRY = ("grpc-retry-pushback-ms", "-1")
"""Trailer by which a server keeps a client's gRPC from retrying (gRFC A6, pushback)."""
MESSAGE_BYTES = 1024
"""Most bytes of a status' message, percent-encoded."""
VIOLATIONS_BYTES = 2560
"""Most bytes of all violations together."""
INFO_VALUE_BYTES = 512
"""Most bytes of a value in an ErrorInfo, percent-encoded."""
_FIELD_BYTES = 192
_DESCRIPTION_BYTES = 512
_CUT = "…"
_OUT_OF_MEMORY_RETRY_SECONDS = 1.0
_DETAIL_TYPES = (error_details_pb2.BadRequest, error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo)
_log = logging.getLogger("klein.errors")


@dataclass(frozen=True)
class RichStatus:
    """A status with its details; a long message is cut off."""

    code: grpc.StatusCode
    message: str
    details: tuple[Message, ...] = ()
    is_final: bool = False
    """Whether a retry would fail in the same way, so that gRPC is to make none."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", shortened(self.message, MESSAGE_BYTES))

    @property
    def reason(self) -> str:
        """Returns `ErrorInfo.reason`; empty without one."""
        infos = (detail for detail in self.details if isinstance(detail, error_details_pb2.ErrorInfo))
        return next((str(info.reason) for info in infos), "")

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Returns the metadata that carries what code and message do not."""
        pushback = (_NO_RETRY,) if self.is_final else ()
        if not self.details:
            return pushback
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in self.details:
            status.details.add().Pack(detail)
        return (*pushback, *rpc_status.to_status(status).trailing_metadata)


@dataclass(frozen=True)
class StatusDetails:
    """A failed call's status, as a client reads it with `explain`."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    """`ErrorInfo.reason`, for example `QUEUE_FULL`; empty when the server gave none."""
    violations: tuple[Violation, ...] = ()
    retry_after_seconds: float | None = None
    """How long the server asks to wait before a retry."""
    metadata: tuple[tuple[str, str], ...] = ()
    """`ErrorInfo.metadata`, sorted by key."""


class PeerFailure(ServiceError):
    """Failure of a call to another server, whose code and details are passed on to the client.

    Args:
        error: how the call to the other server ended.
        name: the other server.
    """

    def __init__(self, error: grpc.aio.AioRpcError, name: str) -> None:
        self.status = RichStatus(error.code(), f"{name}: {error.details()}", tuple(_details_of(error)))
        super().__init__(self.status.message)


def status_of(error: BaseException) -> RichStatus:
    """Returns an error's status. Unexpected errors are logged under a new id, and the client gets only the id."""
    code = grpc.StatusCode
    text = str(error)
    match error:
        case UndecodableMessage():
            info = _info("UNDECODABLE_MESSAGE", type=error.message_name)
            return RichStatus(code.INVALID_ARGUMENT, text, (_bad_request(error.violations), info))
        case InvalidInput():
            return RichStatus(code.INVALID_ARGUMENT, text, (_bad_request(error.violations),))
        case Unauthenticated():
            return RichStatus(code.UNAUTHENTICATED, text, (_info("UNAUTHENTICATED"),))
        case PermissionDenied():
            return RichStatus(code.PERMISSION_DENIED, text, (_info(error.reason),))
        case QuotaExceeded():
            retry = () if error.retry_after_seconds is None else (_retry(error.retry_after_seconds),)
            info = _info("QUOTA_EXCEEDED", quota=error.quota)
            return RichStatus(code.RESOURCE_EXHAUSTED, text, (info, *retry))
        case UnknownModel():
            info = _info("UNKNOWN_MODEL", model=error.name, known=", ".join(error.known))
            return RichStatus(code.NOT_FOUND, text, (_bad_field(error.field, text), info))
        case UnknownAdapter():
            info = _info(UNKNOWN_ADAPTER, adapter=error.name)
            return RichStatus(code.NOT_FOUND, text, (_bad_field(error.field, text), info))
        case UnusableAdapter():
            info = _info("UNUSABLE_ADAPTER", adapter=error.name)
            return RichStatus(code.FAILED_PRECONDITION, text, (_bad_field(error.field, text), info))
        case AdapterMemoryFull():
            details = (_info("ADAPTER_MEMORY_FULL", adapter=error.name), _retry(_OUT_OF_MEMORY_RETRY_SECONDS))
            return RichStatus(code.RESOURCE_EXHAUSTED, text, details)
        case QueueFull():
            info = _info("QUEUE_FULL", limit=error.limit)
            return RichStatus(code.RESOURCE_EXHAUSTED, text, (info, _retry(error.retry_after_seconds)))
        case DeadlineUnreachable():
            info = _info(
                "DEADLINE_UNREACHABLE",
                remaining_seconds=f"{error.remaining_seconds:.3f}",
                estimated_seconds=f"{error.estimated_seconds:.3f}",
            )
            return RichStatus(code.RESOURCE_EXHAUSTED, text, (info,))
        case DeadlinePassed():
            return RichStatus(code.DEADLINE_EXCEEDED, text, (_info("DEADLINE_PASSED"),))
        case ReceiveTimeout():
            info = _info("RECEIVE_TIMEOUT", timeout_seconds=f"{error.timeout_seconds:g}")
            return RichStatus(code.DEADLINE_EXCEEDED, text, (info,))
        case StageUnavailable():
            is_final = isinstance(error, StagesLost)
            return RichStatus(code.UNAVAILABLE, text, (_info("STAGE_UNAVAILABLE"),), is_final)
        case ContentDenied():
            info = _info(CONTENT_DENIED, subject=error.subject, reason_code=error.reason_code)
            return RichStatus(code.PERMISSION_DENIED, text, (info,))
        case ContentPolicyFailed():
            return RichStatus(code.UNAVAILABLE, text, (_info(CONTENT_POLICY_FAILED),), is_final=True)
        case PeerFailure():
            return error.status
        case DeviceOutOfMemory():
            message = "the device has no memory left for this request; retry, or ask for less"
            details = (_info("OUT_OF_MEMORY"), _retry(_OUT_OF_MEMORY_RETRY_SECONDS))
            return _logged(error, RichStatus(code.RESOURCE_EXHAUSTED, message, details))
        case DeviceFault():
            message = "the stage lost its device and ends; another replica can do it"
            return _logged(
                error, RichStatus(code.UNAVAILABLE, message, (_info(DEVICE_FAULT),), is_final=True)
            )
        case _:
            error_id = secrets.token_hex(8)
            _log.error("internal error %s", error_id, exc_info=error, extra={"error_id": error_id})
            message = f"internal error {error_id}; the server's log has the details under this id"
            return RichStatus(code.INTERNAL, message, (_info("INTERNAL_ERROR", error_id=error_id),))


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], status: RichStatus) -> NoReturn:
    """Ends a call with a status, keeping the trailing metadata that was set before."""
    trailing = (*(context.trailing_metadata() or ()), *status.trailing_metadata())
    await context.abort(status.code, status.message, trailing)
    raise AssertionError("abort returned")  # unreachable; type checkers need it


def explain(error: grpc.aio.AioRpcError) -> StatusDetails:
    """Returns a failed call's status with its details."""
    violations: list[Violation] = []
    reason, metadata, retry_after = "", (), None
    for detail in _details_of(error):
        if isinstance(detail, error_details_pb2.BadRequest):
            violations += [Violation(item.field, item.description) for item in detail.field_violations]
        elif isinstance(detail, error_details_pb2.ErrorInfo):
            reason, metadata = detail.reason, tuple(sorted(detail.metadata.items()))
        elif isinstance(detail, error_details_pb2.RetryInfo):
            retry_after = detail.retry_delay.ToTimedelta().total_seconds()
    return StatusDetails(
        error.code(), error.details() or "", reason, tuple(violations), retry_after, metadata
    )


def _details_of(error: grpc.aio.AioRpcError) -> list[Message]:
    messages: list[Message] = []
    try:
        status = rpc_status.from_call(error)
        for packed in status.details if status else ():
            for kind in _DETAIL_TYPES:
                message = kind()
                if packed.Unpack(message):
                    messages.append(message)
    except (DecodeError, ValueError):
        _log.warning("a server sent status details that cannot be read")
        return []
    return messages


def _logged(error: BaseException, status: RichStatus) -> RichStatus:
    _log.error("%s", status.message, exc_info=error)
    return status


def _bad_field(field: str, text: str) -> error_details_pb2.BadRequest:
    """Returns the violation of one field; the text of its error begins with the field's name."""
    return _bad_request([Violation(field, text.removeprefix(f"{field}: "))])


def _bad_request(violations: Sequence[Violation]) -> error_details_pb2.BadRequest:
    return error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field=item.field, description=item.description)
            for item in within_size_limit(violations)
        ]
    )


def _info(reason: str, **metadata: object) -> error_details_pb2.ErrorInfo:
    texts = {key: shortened(str(value), INFO_VALUE_BYTES) for key, value in metadata.items()}
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=texts)


def _retry(seconds: float) -> error_details_pb2.RetryInfo:
    return error_details_pb2.RetryInfo(
        retry_delay=Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
    )


def shortened(text: str, limit_bytes: int) -> str:
    """Returns a text, cut off with an ellipsis where it would take more than `limit_bytes` percent-encoded."""
    if _encoded_bytes(text[: limit_bytes + 1]) <= limit_bytes:
        return text
    room = limit_bytes - _encoded_bytes(_CUT)
    end = 0
    while room >= (width := _encoded_bytes(text[end])):
        room -= width
        end += 1
    return text[:end] + _CUT


def within_size_limit(violations: Sequence[Violation]) -> Iterator[Violation]:
    """Yields as many violations as fit into a status; the last one counts those that do not fit."""
    room = VIOLATIONS_BYTES
    for index, violation in enumerate(violations):
        shown = Violation(
            shortened(violation.field, _FIELD_BYTES), shortened(violation.description, _DESCRIPTION_BYTES)
        )
        room -= len(shown.field.encode()) + len(shown.description.encode())
        if room < 0:
            rest = len(violations) - index
            yield Violation(shown.field, f"is wrong, too: {rest} more violations are not listed")
            return
        yield shown


def _encoded_bytes(text: str) -> int:
    """Returns the size of a text percent-encoded, as gRPC sends it: all but printable ASCII takes 3 bytes each."""
    return sum(1 if 0x20 <= byte <= 0x7E and byte != ord("%") else 3 for byte in text.encode())
