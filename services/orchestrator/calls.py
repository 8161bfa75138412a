"""Calls to stages: their channels, and streaming calls in serialised messages."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self, TypeAlias

import grpc

from services.orchestrator.deadline import Deadline
from services.orchestrator.failures import PUBLIC_FIELDS, StageDisagreement, failure_of
from services.orchestrator.routing import DENOISER, TEXT_ENCODER, VAE_DECODER, StageAddress
from services.orchestrator.sent_status import SentStatus
from services.runtime.channels import open_channel

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


class StageAnswer:
    """What a stage streams back. Leaving its `async with` block ends the call, finished or not.

    Raises, from every method: what `failure_of` makes of the stage's status.
    """

    def __init__(self, address: StageAddress, call: _Answering, fields: Mapping[str, str]) -> None:
        self.address = address
        self._answering = call
        self._fields = fields
        self._status = SentStatus(call)

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
            await self._raise_if_the_stage_cancelled()
            raise

    async def _failure(self) -> Exception:
        """Returns what the caller is to get for this call, which has ended."""
        error = await self._status.sent()
        if error.code() is grpc.StatusCode.OK:
            place = f"{self.address.stage} at {self.address.target}"
            return StageDisagreement(f"{place} ended a call before its input did")
        return failure_of(self.address, error, self._fields)

    async def _raise_if_the_stage_cancelled(self) -> None:
        # grpc.aio raises CancelledError for a CANCELLED status too, which a drain can cause; only our own
        # cancellation may look like one.
        task = asyncio.current_task()
        if task is not None and not task.cancelling() and self._answering.done():
            raise await self._failure() from None


class StageCall(StageAnswer):
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
                await self._raise_if_the_stage_cancelled()
                raise

    async def done_writing(self) -> None:
        """Tells the stage that nothing more comes."""
        try:
            await self._call.done_writing()
        except grpc.aio.InternalError:
            # The stage has ended the call already; whoever reads from it is told why.
            _log.debug("%s ended a call before its input did", self.address.stage)


@dataclass(frozen=True)
class StageCalls:
    """Makes the stage calls of one request; each ends with the request's deadline at the latest.

    `method` is `/package.Service/Method`; `fields` are the public names of the fields that a call passes on.
    """

    channels: Channels
    deadline: Deadline
    metadata: tuple[tuple[str, str], ...] = ()
    """What travels beside the messages of every call."""

    def ask(
        self, address: StageAddress, method: str, request: bytes, fields: Mapping[str, str] = PUBLIC_FIELDS
    ) -> StageAnswer:
        """Makes a call of one request."""
        multicallable: grpc.aio.UnaryStreamMultiCallable[bytes, bytes]
        multicallable = self.channels.serving(address).unary_stream(method)
        call = multicallable(request, timeout=self.deadline.remaining_seconds(), metadata=self.metadata)
        return StageAnswer(address, call, fields)

    def open(
        self, address: StageAddress, method: str, fields: Mapping[str, str] = PUBLIC_FIELDS
    ) -> StageCall:
        """Opens a call whose request is a stream."""
        multicallable: grpc.aio.StreamStreamMultiCallable[bytes, bytes]
        multicallable = self.channels.serving(address).stream_stream(method)
        call = multicallable(timeout=self.deadline.remaining_seconds(), metadata=self.metadata)
        return StageCall(address, call, fields)
