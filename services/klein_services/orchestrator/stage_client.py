"""Client of the stages: calls with one deadline, their streams, and what their failures mean for the client."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self, TypeAlias

import grpc

from klein_core.errors import InvalidInput, Violation
from klein_services.orchestrator.backlog import Backlog
from klein_services.orchestrator.routing import StageAddress
from klein_services.orchestrator.stage_channels import Channels
from klein_services.runtime import tracing
from klein_services.runtime.checksums import (
    DamagedMessage,
    frame_with_checksum,
    with_checksum,
    without_checksum,
)
from klein_services.runtime.errors import StagesLost
from klein_services.runtime.grpc_quirks import PeerStatus, is_cancelled_by_peer
from klein_services.runtime.status import DEVICE_FAULT, UNKNOWN_ADAPTER, PeerFailure, explain
from klein_services.runtime.tracing import NO_SPAN, OpenSpan

ENCODE_PROMPT: Final = "/klein_api.v1.TextEncoderService/EncodePrompt"
ENCODE_REFERENCE: Final = "/klein_api.v1.VaeDecoderService/EncodeReference"
ENCODE_INITIAL_IMAGE: Final = "/klein_api.v1.VaeDecoderService/EncodeInitialImage"
DECODE_LATENTS: Final = "/klein_api.v1.VaeDecoderService/DecodeLatents"
DENOISE_LATENTS: Final = "/klein_api.v1.DenoiserService/DenoiseLatents"

PUBLIC_FIELDS: Mapping[str, str] = {
    "prompt": "prompt",
    "width_px": "width_px",
    "height_px": "height_px",
    "seeds": "seed",
    "step_count": "step_count",
    "guidance_scale": "guidance_scale",
    "reference_count": "references",
    "reference_latents": "references",
    "priority": "priority",
    "format": "format",
    "quality": "quality",
    "preview_interval_steps": "preview_interval_steps",
    "adapters": "adapters",
    "strength": "strength",
}
"""Public names of the fields that the orchestrator passes on, by their names in stage requests."""

_RECEIVE_TIMEOUT = "RECEIVE_TIMEOUT"
_QUEUE_FULL = "QUEUE_FULL"
_REFUSED_PEER = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_BidiCall: TypeAlias = "grpc.aio.StreamStreamCall[bytes, bytes]"
_ResponseCall: TypeAlias = "grpc.aio.UnaryStreamCall[bytes, bytes] | grpc.aio.StreamStreamCall[bytes, bytes]"
_log = logging.getLogger("klein.orchestrator")


@dataclass(frozen=True)
class StageClient:
    """Makes the stage calls of one request; each ends with the request's deadline at the latest.

    `method` is `/package.Service/Method`; `fields` are the public names of the fields that a call passes on.
    """

    channels: Channels
    deadline: Deadline
    metadata: tuple[tuple[str, str], ...] = ()
    """gRPC metadata of every call."""
    backlog: Backlog = field(default_factory=Backlog)
    """Where the work of the calls counts while they are in progress."""

    def unary_stream(
        self, address: StageAddress, method: str, request: bytes, fields: Mapping[str, str] = PUBLIC_FIELDS
    ) -> ServerStream:
        """Opens a call with one serialized request and a stream of responses."""
        multicallable: grpc.aio.UnaryStreamMultiCallable[bytes, bytes]
        channel = self.channels.serving(address)
        multicallable = channel.unary_stream(method)
        span = tracing.client_span(method, address.target)
        call = multicallable(
            with_checksum(request), timeout=self.deadline.remaining_seconds(), metadata=self._metadata(span)
        )
        self.channels.called(channel, call)
        return ServerStream(address, call, fields, span)

    def stream_stream(
        self, address: StageAddress, method: str, fields: Mapping[str, str] = PUBLIC_FIELDS
    ) -> BidiStream:
        """Opens a call with streams in both directions."""
        multicallable: grpc.aio.StreamStreamMultiCallable[bytes, bytes]
        channel = self.channels.serving(address)
        multicallable = channel.stream_stream(method)
        span = tracing.client_span(method, address.target)
        call = multicallable(timeout=self.deadline.remaining_seconds(), metadata=self._metadata(span))
        self.channels.called(channel, call)
        return BidiStream(address, call, fields, span)

    def _metadata(self, span: OpenSpan) -> tuple[tuple[str, str], ...]:
        """Returns a call's metadata, by which the stage makes the call's span the parent of its own."""
        return tuple((dict(self.metadata) | dict(span.headers())).items()) if span else self.metadata


class ServerStream:
    """Stream of a stage's responses. Leaving its `async with` block ends the call, finished or not.

    Raises, from every method: the exception that `failure_of` returns for the stage's status.
    """

    def __init__(
        self, address: StageAddress, call: _ResponseCall, fields: Mapping[str, str], span: OpenSpan = NO_SPAN
    ) -> None:
        self.address = address
        self._responses = call
        self._fields = fields
        self._status = PeerStatus(call)
        self._span = span
        self._failed_with: grpc.StatusCode | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        is_over = self._responses.done()
        self._responses.cancel()
        if self._span:
            code = await self._responses.code() if is_over else grpc.StatusCode.CANCELLED
            tracing.end_client_span(self._span, self._failed_with or code)

    async def messages(self) -> AsyncGenerator[bytes, None]:
        """Yields the stage's serialized messages as they arrive, until it ends the call with OK."""
        try:
            async for message in self._responses:
                yield without_checksum(message)
        except DamagedMessage as error:
            place = f"{self.address.stage} at {self.address.target}"
            raise StageDisagreement(f"{place} sent a damaged message: {error}") from None
        except grpc.aio.AioRpcError:
            raise await self._failure() from None
        except asyncio.CancelledError:
            if is_cancelled_by_peer(self._responses):
                raise await self._failure() from None
            raise

    async def _failure(self) -> Exception:
        """Returns the exception for this call, which has ended."""
        error = await self._status.sent()
        self._failed_with = error.code()
        if error.code() is grpc.StatusCode.OK:
            place = f"{self.address.stage} at {self.address.target}"
            return StageDisagreement(f"{place} ended a call before its input did")
        return failure_of(self.address, error, self._fields)


class BidiStream(ServerStream):
    """Streams of requests to a stage and of its responses."""

    def __init__(
        self, address: StageAddress, call: _BidiCall, fields: Mapping[str, str], span: OpenSpan = NO_SPAN
    ) -> None:
        super().__init__(address, call, fields, span)
        self._call = call
        self._writing = asyncio.Lock()

    async def write(self, message: bytes) -> None:
        """Sends a serialized message once the stage has room for it; concurrent writers take turns."""
        await self._send(with_checksum(message))

    async def write_frame(self, message: bytes) -> None:
        """Sends a message that carries a frame of a tensor, as `write` does."""
        await self._send(frame_with_checksum(message))

    async def _send(self, message: bytes) -> None:
        async with self._writing:
            try:
                await self._call.write(message)
            except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
                raise await self._failure() from None
            except asyncio.CancelledError:
                if is_cancelled_by_peer(self._call):
                    raise await self._failure() from None
                raise

    async def done_writing(self) -> None:
        """Closes the stream of requests."""
        try:
            await self._call.done_writing()
        except grpc.aio.InternalError:
            # The stage has ended the call already; reading its responses raises the reason.
            _log.debug("%s ended a call before its input did", self.address.stage)


class StageDisagreement(Exception):
    """A stage sent or refused something against the protocol between stages: a fault of the suite or the network."""


class StageFull(PeerFailure):
    """A stage has no room for a call now; another replica of it may have.

    Args:
        error: how the call ended.
        address: the stage.
        retry_after_seconds: when this replica expects to have room.
    """

    def __init__(
        self, error: grpc.aio.AioRpcError, address: StageAddress, retry_after_seconds: float
    ) -> None:
        super().__init__(error, address.stage)
        self.address = address
        self.retry_after_seconds = retry_after_seconds


def failure_of(
    address: StageAddress, error: grpc.aio.AioRpcError, fields: Mapping[str, str] = PUBLIC_FIELDS
) -> Exception:
    """Returns the exception of a stage's failed call, in the terms of the public API.

    Args:
        address: the stage.
        error: how its call ended.
        fields: public names of the fields that the call passed on.
    """
    code, message, place = error.code(), error.details() or "", f"{address.stage} at {address.target}"
    details = explain(error)
    if code in _LOST or details.reason == _RECEIVE_TIMEOUT:
        has_lost_device = details.reason == DEVICE_FAULT
        return StagesLost(
            f"{place} is unavailable: {message}", address.stage, has_lost_device=has_lost_device
        )
    if code is grpc.StatusCode.NOT_FOUND and details.reason != UNKNOWN_ADAPTER:
        problem = f"does not serve {address.model!r}, as the routing table says: {message}"
        return StagesLost(f"{place} {problem}", address.stage)
    if code in _REFUSED_PEER:
        # About the orchestrator's certificate, not about the client's token.
        return StagesLost(f"{place} refuses this orchestrator: {message}", address.stage)
    if details.reason == _QUEUE_FULL:
        return StageFull(error, address, details.retry_after_seconds or 0.0)
    if not details.reason and not details.violations and code is not grpc.StatusCode.DEADLINE_EXCEEDED:
        # A stage's own failures have details. This one was made by gRPC, of bytes that it could not read.
        return StageDisagreement(f"the call of {place} broke: {code.name}, {message}")
    if code is not grpc.StatusCode.INVALID_ARGUMENT:
        return PeerFailure(error, address.stage)
    public = [
        Violation(fields.get(violation.field, violation.field), violation.description)
        for violation in details.violations
        if violation.field in fields or violation.field.startswith(("references[", "adapters["))
    ]
    if public and len(public) == len(details.violations):
        return InvalidInput(public)
    return StageDisagreement(f"{place} refused its input: {message}")


@dataclass(frozen=True)
class Deadline:
    """A point in monotonic time that every stage call of a request shares."""

    at_seconds: float
    """Reading of `time.monotonic()`."""

    @classmethod
    def after(cls, remaining_seconds: float | None, maximum_seconds: float) -> Deadline:
        """Returns the deadline of a request that may take `remaining_seconds`, at most `maximum_seconds`."""
        wait = maximum_seconds if remaining_seconds is None else min(remaining_seconds, maximum_seconds)
        return cls(time.monotonic() + wait)

    def remaining_seconds(self) -> float:
        """Returns the time left, at least 0."""
        return max(0.0, self.at_seconds - time.monotonic())
