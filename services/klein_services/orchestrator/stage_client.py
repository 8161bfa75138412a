"""Client of the stages: calls with one deadline, their streams, and what their failures mean for the client."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self, TypeAlias

import grpc

from klein_core.errors import InvalidInput, Violation
from klein_services.orchestrator.backlog import Backlog
from klein_services.orchestrator.routing import DENOISER, TEXT_ENCODER, VAE_DECODER, StageAddress
from klein_services.runtime import tracing
from klein_services.runtime.channels import KEEPALIVE_MILLISECONDS, open_channel
from klein_services.runtime.errors import StagesLost
from klein_services.runtime.grpc_quirks import PeerStatus, is_cancelled_by_peer
from klein_services.runtime.status import DEVICE_FAULT, UNKNOWN_ADAPTER, PeerFailure, explain
from klein_services.runtime.tls import CredentialStore
from klein_services.runtime.tracing import NO_SPAN, OpenSpan

ENCODE_PROMPT: Final = "/klein_api.v1.TextEncoderService/EncodePrompt"
ENCODE_REFERENCE: Final = "/klein_api.v1.VaeDecoderService/EncodeReference"
ENCODE_INITIAL_IMAGE: Final = "/klein_api.v1.VaeDecoderService/EncodeInitialImage"
DECODE_LATENTS: Final = "/klein_api.v1.VaeDecoderService/DecodeLatents"
DENOISE_LATENTS: Final = "/klein_api.v1.DenoiserService/DenoiseLatents"

SERVICES: Final[Mapping[str, str]] = {
    TEXT_ENCODER: "klein_api.v1.TextEncoderService",
    DENOISER: "klein_api.v1.DenoiserService",
    VAE_DECODER: "klein_api.v1.VaeDecoderService",
}
"""The gRPC service of each stage. Its health status decides whether a replica gets calls."""

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
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_OPTIONS = (
    # A stage that came back is used within a second; gRPC's own backoff grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # gRPC's threads answer pings while Python computes, so a replica that does not is stopped or unreachable.
    ("grpc.keepalive_time_ms", KEEPALIVE_MILLISECONDS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MILLISECONDS),
    # gRPC 1.85 waits this long for the answer, a minute by default, whatever the timeout above.
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_MILLISECONDS),
    ("grpc.keepalive_permit_without_calls", 1),
)
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
        multicallable = self.channels.serving(address).unary_stream(method)
        span = tracing.client_span(method, address.target)
        call = multicallable(
            request, timeout=self.deadline.remaining_seconds(), metadata=self._metadata(span)
        )
        return ServerStream(address, call, fields, span)

    def stream_stream(
        self, address: StageAddress, method: str, fields: Mapping[str, str] = PUBLIC_FIELDS
    ) -> BidiStream:
        """Opens a call with streams in both directions."""
        multicallable: grpc.aio.StreamStreamMultiCallable[bytes, bytes]
        multicallable = self.channels.serving(address).stream_stream(method)
        span = tracing.client_span(method, address.target)
        call = multicallable(timeout=self.deadline.remaining_seconds(), metadata=self._metadata(span))
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

    async def messages(self) -> AsyncIterator[bytes]:
        """Yields the stage's serialized messages as they arrive, until it ends the call with OK."""
        try:
            async for message in self._responses:
                yield message
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
    """A stage sent or refused something against the protocol between stages: a fault of the suite, not the client's."""


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


class Channels:
    """One channel for each target, opened when it is first needed.

    When the credentials are replaced, new calls get new channels; running ones keep theirs until they must have ended.

    Args:
        credentials: of TLS; `None` calls stages in plaintext.
        server_name: name that every stage's certificate must have; empty means the target's host.
        longest_call_seconds: time after which no call on a replaced channel can still run.
        options: further options of every channel.
    """

    def __init__(
        self,
        credentials: CredentialStore | None = None,
        server_name: str = "",
        longest_call_seconds: float = 3600.0,
        options: Sequence[tuple[str, int]] = (),
    ) -> None:
        self._store = credentials
        self._options = (*_OPTIONS, *options)
        self._server_name = server_name
        self._longest_call_seconds = longest_call_seconds
        self._credentials = credentials.current if credentials else None
        self._channels: dict[tuple[str, str], grpc.aio.Channel] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._users: Counter[str] = Counter()
        self._retained: frozenset[str] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    def serving(self, address: StageAddress) -> grpc.aio.Channel:
        """Returns the channel that reaches the stage's replicas whose health is SERVING."""
        return self._channel(address.target, SERVICES[address.stage])

    def any(self, address: StageAddress) -> grpc.aio.Channel:
        """Returns the channel that reaches every replica of the stage, also those that load or drain."""
        return self._channel(address.target, "")

    def to(self, target: str) -> grpc.aio.Channel:
        """Returns the channel to a server that is no stage."""
        return self._channel(target, "")

    @contextmanager
    def used(self, *addresses: StageAddress) -> Iterator[None]:
        """Keeps the channels to these stages open while the block runs, also when `retain` leaves them out."""
        targets = {address.target for address in addresses}
        self._users.update(targets)
        try:
            yield
        finally:
            self._users.subtract(targets)
            self._close_unused()

    def retain(self, addresses: Iterable[StageAddress]) -> None:
        """Closes all other channels, each as soon as it is not used."""
        self._retained = frozenset(address.target for address in addresses)
        self._close_unused()

    def _close_unused(self) -> None:
        self._users = +self._users
        if self._retained is None:
            return
        for key in list(self._channels):
            if key[0] not in self._retained and key[0] not in self._users:
                task = asyncio.create_task(self._channels.pop(key).close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    def _channel(self, target: str, service: str) -> grpc.aio.Channel:
        if self._store is not None and self._store.current is not self._credentials:
            self._credentials = self._store.current
            task = asyncio.create_task(self._retire(list(self._channels.values())))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
            self._channels = {}
        key = (target, service)
        if key not in self._channels:
            self._channels[key] = open_channel(
                target,
                health_service=service,
                credentials=self._credentials,
                server_name=self._server_name,
                options=self._options,
            )
        return self._channels[key]

    async def _retire(self, channels: list[grpc.aio.Channel]) -> None:
        """Closes channels after the longest call, or when this task is cancelled."""
        # channel.close(grace) would miss calls that no task waits for at the moment.
        try:
            await asyncio.sleep(self._longest_call_seconds)
        finally:
            await asyncio.gather(*(channel.close() for channel in channels))

    async def close(self) -> None:
        channels, self._channels = list(self._channels.values()), {}
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*(channel.close() for channel in channels), *self._closing)
        await asyncio.gather(*self._retiring, return_exceptions=True)
