"""How long a request may still take."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self, TypeAlias

import grpc

from klein_core.errors import InvalidInput, Violation
from klein_services.orchestrator.routing import DENOISER, TEXT_ENCODER, VAE_DECODER, StageAddress
from klein_services.runtime.channels import open_channel
from klein_services.runtime.errors import StagesLost
from klein_services.runtime.grpc_quirks import PeerStatus, is_cancelled_by_peer
from klein_services.runtime.status import UNKNOWN_ADAPTER, PeerFailure, explain


@dataclass(frozen=True)
class Deadline:
    """A point in monotonic time that every stage call of a request shares."""

    at_seconds: float
    """Reading of `time.monotonic()` after which nobody waits for the answer."""

    @classmethod
    def after(cls, remaining_seconds: float | None, maximum_seconds: float) -> Deadline:
        """Makes the deadline of a caller that waits `remaining_seconds`; `None` is `maximum_seconds`."""
        wait = maximum_seconds if remaining_seconds is None else min(remaining_seconds, maximum_seconds)
        return cls(time.monotonic() + wait)

    def remaining_seconds(self) -> float:
        """Returns the time left, at least 0."""
        return max(0.0, self.at_seconds - time.monotonic())


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
}
"""Public names of the fields that the orchestrator passes on, by their names in stage requests."""

_RECEIVE_TIMEOUT = "RECEIVE_TIMEOUT"
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class StageDisagreement(Exception):
    """A stage sent or refused what the protocol between stages does not foresee; a fault of ours."""


def failure_of(
    address: StageAddress, error: grpc.aio.AioRpcError, fields: Mapping[str, str] = PUBLIC_FIELDS
) -> Exception:
    """Returns what the caller of the public API is to get for a stage's failed call.

    Args:
        address: the stage.
        error: how its call ended.
        fields: public names of the fields that the call passed on.
    """
    code, message = error.code(), error.details() or ""
    if code in _LOST or explain(error).reason == _RECEIVE_TIMEOUT:
        return StagesLost(f"{address.stage} at {address.target} is unavailable: {message}")
    if code is grpc.StatusCode.NOT_FOUND and explain(error).reason != UNKNOWN_ADAPTER:
        return StagesLost(
            f"{address.stage} at {address.target} does not serve {address.model!r}, "
            f"as the routing table says: {message}"
        )
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return _invalid_input(address, error, fields)
    return PeerFailure(error, address.stage)


def _invalid_input(
    address: StageAddress, error: grpc.aio.AioRpcError, fields: Mapping[str, str]
) -> Exception:
    violations = explain(error).violations
    public = [
        Violation(fields.get(violation.field, violation.field), violation.description)
        for violation in violations
        if violation.field in fields or violation.field.startswith(("references[", "adapters["))
    ]
    if public and len(public) == len(violations):
        return InvalidInput(public)
    return StageDisagreement(f"{address.stage} at {address.target} refused its input: {error.details()}")


ENCODE_PROMPT: Final = "/klein_api.v1.TextEncoderService/EncodePrompt"
ENCODE_REFERENCE: Final = "/klein_api.v1.VaeDecoderService/EncodeReference"
DECODE_LATENTS: Final = "/klein_api.v1.VaeDecoderService/DecodeLatents"
DENOISE_LATENTS: Final = "/klein_api.v1.DenoiserService/DenoiseLatents"

SERVICES: Final[Mapping[str, str]] = {
    TEXT_ENCODER: "klein_api.v1.TextEncoderService",
    DENOISER: "klein_api.v1.DenoiserService",
    VAE_DECODER: "klein_api.v1.VaeDecoderService",
}
"""The gRPC service of each stage, whose health says whether a replica takes calls."""

_Conversing: TypeAlias = "grpc.aio.StreamStreamCall[bytes, bytes]"
_Answering: TypeAlias = "grpc.aio.UnaryStreamCall[bytes, bytes] | grpc.aio.StreamStreamCall[bytes, bytes]"
_log = logging.getLogger("klein.orchestrator")
_RECONNECT = (("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 2_000))
"""A stage that came back is used within seconds; gRPC's own backoff grows to two minutes."""


class Channels:
    """One channel for each target, opened when it is first needed."""

    def __init__(self) -> None:
        self._channels: dict[tuple[str, str], grpc.aio.Channel] = {}

    def serving(self, address: StageAddress) -> grpc.aio.Channel:
        """Returns the channel that reaches the stage's replicas whose health is SERVING."""
        return self._channel(address.target, SERVICES[address.stage])

    def any(self, address: StageAddress) -> grpc.aio.Channel:
        """Returns the channel that reaches every replica of the stage, also those that load or drain."""
        return self._channel(address.target, "")

    def _channel(self, target: str, service: str) -> grpc.aio.Channel:
        key = (target, service)
        if key not in self._channels:
            self._channels[key] = open_channel(target, health_service=service, options=_RECONNECT)
        return self._channels[key]

    async def close(self) -> None:
        channels, self._channels = list(self._channels.values()), {}
        await asyncio.gather(*(channel.close() for channel in channels))


class ServerStream:
    """What a stage streams back. Leaving its `async with` block ends the call, finished or not.

    Raises, from every method: what `failure_of` makes of the stage's status.
    """

    def __init__(self, address: StageAddress, call: _Answering, fields: Mapping[str, str]) -> None:
        self.address = address
        self._answering = call
        self._fields = fields
        self._status = PeerStatus(call)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._answering.cancel()

    async def messages(self) -> AsyncIterator[bytes]:
        """Yields the stage's messages as they arrive, until it ends the call with OK."""
        try:
            async for message in self._answering:
                yield message
        except grpc.aio.AioRpcError:
            raise await self._failure() from None
        except asyncio.CancelledError:
            if is_cancelled_by_peer(self._answering):
                raise await self._failure() from None
            raise

    async def _failure(self) -> Exception:
        """Returns what the caller is to get for this call, which has ended."""
        error = await self._status.sent()
        if error.code() is grpc.StatusCode.OK:
            place = f"{self.address.stage} at {self.address.target}"
            return StageDisagreement(f"{place} ended a call before its input did")
        return failure_of(self.address, error, self._fields)


class BidiStream(ServerStream):
    """A call whose request is a stream, too."""

    def __init__(self, address: StageAddress, call: _Conversing, fields: Mapping[str, str]) -> None:
        super().__init__(address, call, fields)
        self._call = call
        self._writing = asyncio.Lock()

    async def write(self, message: bytes) -> None:
        """Sends a message once the stage has room for it; concurrent writers take turns."""
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
        """Tells the stage that nothing more comes."""
        try:
            await self._call.done_writing()
        except grpc.aio.InternalError:
            # The stage has ended the call already; whoever reads from it is told why.
            _log.debug("%s ended a call before its input did", self.address.stage)


@dataclass(frozen=True)
class StageClient:
    """Makes the stage calls of one request; each ends with the request's deadline at the latest.

    `method` is `/package.Service/Method`; `fields` are the public names of the fields that a call passes on.
    """

    channels: Channels
    deadline: Deadline
    metadata: tuple[tuple[str, str], ...] = ()
    """What travels beside the messages of every call."""

    def ask(
        self, address: StageAddress, method: str, request: bytes, fields: Mapping[str, str] = PUBLIC_FIELDS
    ) -> ServerStream:
        """Makes a call of one request."""
        multicallable: grpc.aio.UnaryStreamMultiCallable[bytes, bytes]
        multicallable = self.channels.serving(address).unary_stream(method)
        call = multicallable(request, timeout=self.deadline.remaining_seconds(), metadata=self.metadata)
        return ServerStream(address, call, fields)

    def open(
        self, address: StageAddress, method: str, fields: Mapping[str, str] = PUBLIC_FIELDS
    ) -> BidiStream:
        """Opens a call whose request is a stream."""
        multicallable: grpc.aio.StreamStreamMultiCallable[bytes, bytes]
        multicallable = self.channels.serving(address).stream_stream(method)
        call = multicallable(timeout=self.deadline.remaining_seconds(), metadata=self.metadata)
        return BidiStream(address, call, fields)
