"""Asynchronous client of a suite."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

import grpc

from klein_api.v1 import image_service_pb2 as api
from klein_api.v1.image_service_pb2_grpc import ImageServiceStub
from klein_client.endpoint import Endpoint, Tls
from klein_client.errors import Cancelled, KleinError, UnusableClient, call_error
from klein_client.models import Model, Status, read_status
from klein_client.request import (
    ImageOptions,
    call_metadata,
    check_names,
    image_sources,
    image_spec,
    timeout_of,
)
from klein_client.results import Collector, Event, Generation, Image, read_event
from klein_client.retries import Attempts
from klein_client.sources import download_async, is_url, read_source

if TYPE_CHECKING:
    from klein_api.v1.image_service_pb2_grpc import ImageServiceAsyncStub

STATUS_SECONDS = 10.0
"""Default timeout of `models` and `status`."""


class AsyncClient:
    """Client of a suite for asyncio; connects on its first call and belongs to the event loop of that.

    Args:
        target: `HOST:PORT`, or `grpcs://HOST:PORT` for TLS; by default `KLEIN_TARGET`, else the suite on this machine.
        token: of the suite's own authentication; by default `KLEIN_TOKEN`.
        tls: True for TLS with public authorities, or `Tls` with files.
        timeout_seconds: longest time of a request that has no timeout of its own.
        retry: whether broken streams are continued and overloaded servers asked again, within the timeout.
        options: further options of the gRPC channel.

    Raises:
        ValueError: an argument cannot be used.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        token: str | None = None,
        tls: Tls | bool = False,
        timeout_seconds: float = 600.0,
        retry: bool = True,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        self.endpoint = Endpoint(target, token=token, tls=tls, options=options)
        self.timeout_seconds = timeout_of(timeout_seconds, timeout_seconds)
        self.retry = retry
        self._channel: grpc.aio.Channel | None = None
        self._owner: tuple[int, asyncio.AbstractEventLoop] | None = None
        self._is_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the connection; calls in progress end with `Cancelled`. May be called again."""
        self._is_closed = True
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def generate(self, prompt: str, **options: Unpack[ImageOptions]) -> Generation:
        """Makes images and returns them once all are done. `ImageOptions` describes the options.

        Raises:
            KleinError: the request failed.
        """
        check_names(options, "generate")
        async with self.stream(prompt, **options) as events:
            return await events.result()

    def stream(
        self, prompt: str, *, preview_interval: int = 0, **options: Unpack[ImageOptions]
    ) -> AsyncEventStream:
        """Makes images and returns their events. Leaving its `async with` block cancels the request.

        Args:
            prompt: the prompt or the instruction.
            preview_interval: steps after which a preview of the first image comes again; 0 means none.
            options: as `ImageOptions` describes them.
        """
        check_names(options, "stream")
        return AsyncEventStream(self, prompt, preview_interval, options)

    async def models(self, *, timeout_seconds: float = STATUS_SECONDS) -> tuple[Model, ...]:
        """Returns the models with their limits, defaults and adapters; raises KleinError."""
        return (await self.status(timeout_seconds=timeout_seconds)).models

    async def status(self, *, timeout_seconds: float = STATUS_SECONDS, token: str | None = None) -> Status:
        """Returns the state of the suite: its models and their stages; raises KleinError."""
        stub = self.stub()
        call = stub.ListModels(
            api.ListModelsRequest(),
            timeout=timeout_of(timeout_seconds, STATUS_SECONDS),
            metadata=call_metadata({"token": token}, self.endpoint.authorization, retry=False),
        )
        try:
            return read_status(await call)
        except grpc.aio.AioRpcError as error:
            raise call_error(error, self.endpoint.target) from error
        except asyncio.CancelledError as error:
            if (failure := ended_by_peer(call)) is None:
                raise
            raise failure from error

    def stub(self) -> ImageServiceAsyncStub:
        """Returns the stub of the connection, which is opened if there is none.

        Raises:
            UnusableClient: the client is closed, or belongs to another event loop or process.
        """
        owner = (os.getpid(), asyncio.get_running_loop())
        if self._is_closed:
            raise UnusableClient("the client is closed; make a new one")
        if self._channel is None:
            self._owner = owner
            endpoint = self.endpoint
            if endpoint.credentials is None:
                self._channel = grpc.aio.insecure_channel(endpoint.target, options=endpoint.options)
            else:
                self._channel = grpc.aio.secure_channel(
                    endpoint.target, endpoint.credentials, options=endpoint.options
                )
        if self._owner != owner:
            where = "process" if self._owner and self._owner[0] != owner[0] else "event loop"
            raise UnusableClient(f"the client was used in another {where}; make one for each")
        return ImageServiceStub(self._channel)


class AsyncEventStream:
    """Events of one request: an asynchronous iterator and context manager."""

    def __init__(
        self, client: AsyncClient, prompt: str, preview_interval: int, options: ImageOptions
    ) -> None:
        self._client = client
        self._prompt = prompt
        self._preview_interval = preview_interval
        self._options = options
        self._call: grpc.aio.UnaryStreamCall[Any, Any] | None = None
        self._closing = asyncio.Event()
        self._events = self._run()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        return await anext(self._events)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancels the request unless it is done; a task that waits for an event gets `Cancelled`."""
        self._closing.set()
        if self._call is not None:
            self._call.cancel()
        with suppress(RuntimeError):
            # Another task waits for an event; it ends there.
            await self._events.aclose()

    async def result(self) -> Generation:
        """Reads the rest of the events and returns the images and the summary."""
        collector = Collector()
        async for event in self:
            collector.add(event)
        return collector.generation()

    async def _run(self) -> AsyncGenerator[Event, None]:
        client, options = self._client, self._options
        deadline = time.monotonic() + timeout_of(options.get("timeout_seconds"), client.timeout_seconds)
        metadata = call_metadata(options, client.endpoint.authorization, retry=client.retry)
        files = {
            field: await download_async(str(source), field, deadline)
            if is_url(source)
            else await asyncio.to_thread(read_source, source, field)
            for field, source in image_sources(options).items()
        }
        spec = image_spec(self._prompt, options, files, metadata, retry=client.retry)
        request = api.StreamGenerateImageRequest(spec=spec, preview_interval_steps=self._preview_interval)
        attempts = Attempts(enabled=client.retry, deadline=deadline)
        received: set[int] = set()
        while True:
            if self._closing.is_set():
                raise Cancelled("the stream is closed", code=grpc.StatusCode.CANCELLED)
            stub = client.stub()
            call = stub.StreamGenerateImage(request, timeout=attempts.remaining(), metadata=metadata)
            self._call = call
            has_begun = False
            try:
                async for message in call:
                    has_begun = True
                    event = read_event(message)
                    if isinstance(event, Image):
                        if event.index in received:
                            continue
                        received.add(event.index)
                    if event is not None:
                        yield event
                return
            except grpc.aio.AioRpcError as error:
                failure = call_error(error, client.endpoint.target)
                has_begun = has_begun or bool(error.initial_metadata())
                pause = attempts.pause_before_next(failure, error.trailing_metadata(), has_begun=has_begun)
                if pause is None:
                    raise failure from error
            except asyncio.CancelledError as error:
                if (peer_failure := ended_by_peer(call)) is None:
                    raise
                raise peer_failure from error
            finally:
                call.cancel()
            try:
                await asyncio.wait_for(self._closing.wait(), pause)
            except TimeoutError:
                continue


def ended_by_peer(call: grpc.aio.Call) -> KleinError | None:
    """Returns the error of a call that was cancelled, unless the current task was.

    grpc.aio raises asyncio.CancelledError for a CANCELLED status of the server and for `call.cancel()`, too; only the
    cancellation of the current task may be passed on as one: https://github.com/grpc/grpc/pull/21232
    """
    task = asyncio.current_task()
    if task is None or task.cancelling() or not call.done():
        return None
    return Cancelled("the call was cancelled", code=grpc.StatusCode.CANCELLED)
