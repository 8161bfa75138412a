"""Synchronous client of a suite."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

import grpc

from klein_api.v1 import image_service_pb2 as api
from klein_api.v1.image_service_pb2_grpc import ImageServiceStub
from klein_client.endpoint import Endpoint, Tls
from klein_client.errors import Cancelled, UnusableClient, call_error
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
from klein_client.sources import download, is_url, read_source

if TYPE_CHECKING:
    from collections.abc import Generator

STATUS_SECONDS = 10.0
"""Default timeout of `models` and `status`."""


class Client:
    """Client of a suite; connects on its first call, may be used by several threads, and needs no event loop.

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
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._process_id = os.getpid()
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; calls in progress end with `Cancelled`. May be called again, and by any thread."""
        with self._lock:
            self._is_closed = True
            channel, self._channel = self._channel, None
        # The parent of a forked process goes on with its connection.
        if channel is not None and self._process_id == os.getpid():
            channel.close()

    def generate(self, prompt: str, **options: Unpack[ImageOptions]) -> Generation:
        """Makes images and returns them once all are done. `ImageOptions` describes the options.

        Raises:
            KleinError: the request failed.
        """
        check_names(options, "generate")
        with self.stream(prompt, **options) as events:
            return events.result()

    def stream(
        self, prompt: str, *, preview_interval: int = 0, **options: Unpack[ImageOptions]
    ) -> EventStream:
        """Makes images and returns their events. Leaving its `with` block cancels the request.

        Args:
            prompt: the prompt or the instruction.
            preview_interval: steps after which a preview of the first image comes again; 0 means none.
            options: as `ImageOptions` describes them.
        """
        check_names(options, "stream")
        return EventStream(self, prompt, preview_interval, options)

    def models(self, *, timeout_seconds: float = STATUS_SECONDS) -> tuple[Model, ...]:
        """Returns the models with their limits, defaults and adapters; raises KleinError."""
        return self.status(timeout_seconds=timeout_seconds).models

    def status(self, *, timeout_seconds: float = STATUS_SECONDS, token: str | None = None) -> Status:
        """Returns the state of the suite: its models and their stages; raises KleinError."""
        metadata = call_metadata({"token": token}, self.endpoint.authorization, retry=False)
        timeout = timeout_of(timeout_seconds, STATUS_SECONDS)
        try:
            answer = self.stub().ListModels(api.ListModelsRequest(), timeout=timeout, metadata=metadata)
        except grpc.RpcError as error:
            raise call_error(error, self.endpoint.target) from error
        return read_status(answer)

    def stub(self) -> ImageServiceStub:
        """Returns the stub of the connection, which is opened if there is none.

        Raises:
            UnusableClient: the client is closed, or was used before this process was forked.
        """
        with self._lock:
            if self._is_closed:
                raise UnusableClient("the client is closed; make a new one")
            if self._channel is None:
                self._process_id = os.getpid()
                endpoint = self.endpoint
                if endpoint.credentials is None:
                    self._channel = grpc.insecure_channel(endpoint.target, options=endpoint.options)
                else:
                    self._channel = grpc.secure_channel(
                        endpoint.target, endpoint.credentials, options=endpoint.options
                    )
            elif self._process_id != os.getpid():
                raise UnusableClient("the client was used before this process was forked; make one for each")
            return ImageServiceStub(self._channel)


class EventStream:
    """Events of one request: an iterator and context manager. Any thread may close it."""

    def __init__(self, client: Client, prompt: str, preview_interval: int, options: ImageOptions) -> None:
        self._client = client
        self._prompt = prompt
        self._preview_interval = preview_interval
        self._options = options
        self._lock = threading.Lock()
        self._call: grpc.Call | None = None
        self._closing = threading.Event()
        self._events = self._run()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        return next(self._events)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels the request unless it is done; a thread that waits for an event gets `Cancelled`."""
        self._closing.set()
        with self._lock:
            call = self._call
        if call is not None:
            call.cancel()
        with suppress(ValueError):
            # Another thread waits for an event; it ends there.
            self._events.close()

    def result(self) -> Generation:
        """Reads the rest of the events and returns the images and the summary."""
        collector = Collector()
        for event in self:
            collector.add(event)
        return collector.generation()

    def _run(self) -> Generator[Event, None, None]:
        client, options = self._client, self._options
        deadline = time.monotonic() + timeout_of(options.get("timeout_seconds"), client.timeout_seconds)
        metadata = call_metadata(options, client.endpoint.authorization, retry=client.retry)
        files = {
            field: download(str(source), field, deadline) if is_url(source) else read_source(source, field)
            for field, source in image_sources(options).items()
        }
        spec = image_spec(self._prompt, options, files, metadata, retry=client.retry)
        request = api.StreamGenerateImageRequest(spec=spec, preview_interval_steps=self._preview_interval)
        attempts = Attempts(enabled=client.retry, deadline=deadline)
        received: set[int] = set()
        while True:
            stub = client.stub()
            with self._lock:
                if self._closing.is_set():
                    raise Cancelled("the stream is closed", code=grpc.StatusCode.CANCELLED)
                call = stub.StreamGenerateImage(request, timeout=attempts.remaining(), metadata=metadata)
                self._call = call
            has_begun = False
            try:
                for message in call:
                    has_begun = True
                    event = read_event(message)
                    if isinstance(event, Image):
                        if event.index in received:
                            continue
                        received.add(event.index)
                    if event is not None:
                        yield event
                return
            except grpc.RpcError as error:
                failure = call_error(error, client.endpoint.target)
                has_begun = has_begun or bool(call.initial_metadata())
                pause = attempts.pause_before_next(failure, call.trailing_metadata(), has_begun=has_begun)
                if pause is None:
                    raise failure from error
            finally:
                call.cancel()
            self._closing.wait(pause)
