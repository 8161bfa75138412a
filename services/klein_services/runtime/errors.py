"""Errors of a server that are not the model's.

ServiceError
├── QueueFull             the bounded queue is full; retry after `retry_after_seconds`
├── DeadlineUnreachable   the request would finish after its deadline; nothing was computed
├── DeadlinePassed        the request's deadline passed
├── ReceiveTimeout        the client's stream stalled or never ended
├── StageUnavailable      loading, draining or lost; another replica may do it
│   └── StagesLost        stages behind this server are lost; its other replicas would call the same ones
├── UndecodableMessage    a message is not one of its type; an InvalidInput, too
├── Unauthenticated       the call has no valid token
├── PermissionDenied      its token does not allow what it asks for
│   ├── ModelNotAllowed   a model
│   └── UnknownPeer       its certificate has none of the names that are allowed here
├── QuotaExceeded         its token's quota is used up; retry after `retry_after_seconds`
├── UnknownModel          the name is not served here
├── UnknownAdapter        the name is not in the adapters' folder
├── UnusableAdapter       its file cannot be applied to this model
├── AdapterMemoryFull     the adapters in use fill their memory; retry later
├── ContentDenied         the operator's content policy refuses the request or its image
└── ContentPolicyFailed   the content policy gave no decision, and requests need one

`klein_core.errors` has the model's own errors; `klein_services.runtime.status` maps both to gRPC.
"""

from __future__ import annotations

from collections.abc import Sequence

from klein_core.errors import DeviceFault, InvalidInput, Violation

_SHOWN_CHARACTERS = 64
"""Most characters of a client's text that an error repeats: statuses are headers, whose size is bounded."""
_SHOWN_NAMES = 20
_SHOWN_REASON = 1000


class ServiceError(Exception):
    """Base of every error that servers raise on purpose; its text is sent to the client."""


class QueueFull(ServiceError):
    """The queue already holds `limit` requests, or `limit` of the unit that `what` names."""

    def __init__(self, limit: int, retry_after_seconds: float = 1.0, what: str = "requests wait") -> None:
        self.limit = limit
        self.retry_after_seconds = retry_after_seconds
        super().__init__(f"the queue is full ({limit} {what}); retry in {retry_after_seconds:.1f} s")


class DeadlineUnreachable(ServiceError):
    """The request would finish after its deadline, so it was not begun."""

    def __init__(self, remaining_seconds: float, estimated_seconds: float) -> None:
        self.remaining_seconds = remaining_seconds
        self.estimated_seconds = estimated_seconds
        super().__init__(
            f"the deadline is in {remaining_seconds:.1f} s and the request would take about "
            f"{estimated_seconds:.1f} s; allow more time or retry when the stage is less busy"
        )


class DeadlinePassed(ServiceError):
    """The deadline of the request has passed."""

    def __init__(self, reason: str = "the deadline passed before the work began") -> None:
        super().__init__(reason)


class ReceiveTimeout(ServiceError):
    """The request's stream was not complete within the time that a server waits for one."""

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        super().__init__(
            f"the request's stream was not complete after {timeout_seconds:g} s; "
            "send all parts without pause and close the sending side"
        )


class UndecodableMessage(ServiceError, InvalidInput):
    """A message's bytes are not one of its type: broken protobuf, or text that is not UTF-8."""

    def __init__(self, message_name: str) -> None:
        self.message_name = message_name
        InvalidInput.__init__(
            self,
            [
                Violation(
                    "request",
                    f"cannot be decoded as {message_name}: broken protobuf or text, or another type",
                )
            ],
        )


class Unauthenticated(ServiceError):
    """The call has no token or an unknown one; the text is the same for both."""

    def __init__(self) -> None:
        super().__init__("this server needs a valid token in the metadata 'authorization: Bearer TOKEN'")


class PermissionDenied(ServiceError):
    """The call's token does not allow what it asks for. `reason` is in upper case, for programs."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


class UnknownPeer(PermissionDenied):
    """The client's certificate is valid, and has none of the names that this server allows."""

    def __init__(self, names: Sequence[str]) -> None:
        listed = ", ".join(_shortened(name) for name in names[:_SHOWN_NAMES]) or "no name"
        super().__init__(
            "UNKNOWN_PEER",
            f"the certificate of this client is for {listed}, which KLEIN_TLS_CLIENT_NAMES of the server does not "
            "list; use another certificate, or add the name there",
        )


class QuotaExceeded(ServiceError):
    """A quota of the call's token is used up.

    Args:
        quota: its name in the tokens file.
        message: what is asked and allowed.
        retry_after_seconds: after this time the same request passes if no other is made; `None` when it never does.
    """

    def __init__(self, quota: str, message: str, retry_after_seconds: float | None) -> None:
        self.quota = quota
        self.retry_after_seconds = retry_after_seconds
        retry = "" if retry_after_seconds is None else f"; retry in {retry_after_seconds:.1f} s"
        super().__init__(message + retry)


class ModelNotAllowed(PermissionDenied):
    """The request names a model that its token does not allow. Whether there is such a model is not revealed."""

    def __init__(self, name: str, allowed: Sequence[str]) -> None:
        super().__init__(
            "MODEL_NOT_ALLOWED",
            f"model: this token does not allow {_shortened(name)!r}; it allows {', '.join(allowed) or 'none'}",
        )


class StageUnavailable(ServiceError):
    """The stage takes no work now: it loads, drains or is lost. `reason` is sent to the client."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class StagesLost(StageUnavailable):
    """Stages behind this server take no work, after all attempts.

    A retry at another replica of this server is useless: it would call the same stages.

    Args:
        reason: sent to the client.
        stage: name of the stage; empty when several or none in particular are lost.
        has_lost_device: whether the stage reported that its device failed, which the request may have caused.
    """

    def __init__(self, reason: str, stage: str = "", *, has_lost_device: bool = False) -> None:
        self.stage = stage
        self.has_lost_device = has_lost_device
        super().__init__(reason)


class UnknownModel(ServiceError):
    """The request names a model that is not served here."""

    def __init__(self, field: str, name: str, known: Sequence[str]) -> None:
        self.field = field
        self.name = _shortened(name)
        self.known = tuple(known)
        listed = ", ".join(known) if known else "none"
        super().__init__(f"{field}: there is no model {self.name!r} here; known: {listed}")


class UnknownAdapter(ServiceError):
    """The request names an adapter that is not offered here."""

    def __init__(self, field: str, name: str, known: Sequence[str]) -> None:
        self.field = field
        self.name = _shortened(name)
        self.known = tuple(known)
        shown = ", ".join(self.known[:_SHOWN_NAMES]) or "none"
        rest = len(self.known) - _SHOWN_NAMES
        more = f" and {rest} more" if rest > 0 else ""
        super().__init__(f"{field}: there is no adapter {self.name!r} here; known: {shown}{more}")


class UnusableAdapter(ServiceError):
    """The adapter's file is broken, of a kind that is not applied, or for another model."""

    def __init__(self, field: str, name: str, reason: str) -> None:
        self.field = field
        self.name = _shortened(name)
        self.reason = reason if len(reason) <= _SHOWN_REASON else reason[:_SHOWN_REASON] + "…"
        super().__init__(f"{field}: the adapter {self.name!r} cannot be used: {self.reason}")


class AdapterMemoryFull(ServiceError):
    """Adapters that requests hold now take all the memory that adapters may take."""

    def __init__(self, name: str, limit_bytes: int) -> None:
        self.name = _shortened(name)
        self.limit_bytes = limit_bytes
        super().__init__(
            f"the adapter {self.name!r} does not fit next to those that other requests use now "
            f"({limit_bytes / 2**20:.0f} MiB in all); retry"
        )


class ContentDenied(ServiceError):
    """The operator's content policy refuses a request or an image that was made for it."""

    def __init__(self, subject: str, reason_code: str, reason: str) -> None:
        self.subject = subject
        """request or image."""
        self.reason_code = _shortened(reason_code) or "UNSPECIFIED"
        detail = f": {reason}" if reason else ""
        super().__init__(f"the content policy denies this {subject}{detail}")


class ContentPolicyFailed(ServiceError):
    """The content policy gave no decision; without one, nothing is made and no image is sent."""

    def __init__(self) -> None:
        super().__init__("the content policy gave no decision, and requests need one; retry later")


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


class DeviceOutOfMemory(DeviceFault):
    """The device had no memory for this request; later, smaller ones may fit."""


_OUT_OF_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "not enough memory")
_FAULT_TEXTS = ("CUDA error", "cuDNN error", "CUBLAS_STATUS", "HIP error")


def as_device_fault(error: Exception) -> Exception:
    """Returns the `DeviceFault` that an exception stands for, or the exception itself.

    torch has a class for either case since 2.8, but in places it still raises a plain `RuntimeError`, and
    only the text shows that the device's context is lost.
    """
    if isinstance(error, DeviceFault):
        return error
    fault: Exception
    if (
        isinstance(error, MemoryError)
        or _has_class(error, "OutOfMemoryError")
        or _mentions(error, _OUT_OF_MEMORY_TEXTS)
    ):
        fault = DeviceOutOfMemory(str(error))
    elif _has_class(error, "AcceleratorError") or _mentions(error, _FAULT_TEXTS):
        fault = DeviceFault(str(error))
    else:
        return error
    fault.__cause__ = error
    return fault


def _has_class(error: Exception, name: str) -> bool:
    return any(kind.__name__ == name and kind.__module__.startswith("torch") for kind in type(error).__mro__)


def _mentions(error: Exception, texts: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
