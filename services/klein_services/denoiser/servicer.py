"""DenoiserService: parse, hand over to the step loop, tell what happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TypeAlias

import grpc

from klein_api.v1 import denoiser_service_pb2 as api
from klein_api.v1 import denoiser_service_pb2_grpc
from klein_core.denoiser.adapters.adapter import ScaledAdapter
from klein_services.denoiser.adapters import AdapterRegistry
from klein_services.denoiser.engine import Engine
from klein_services.denoiser.events import EventChannel, Finished, Message, Responses
from klein_services.denoiser.job import Job
from klein_services.denoiser.request import Model, Order, RequestLimits, RequestReader
from klein_services.denoiser.request_planner import Workload
from klein_services.runtime.admission import receive
from klein_services.runtime.worker import Worker

SERVICE_NAME = "klein_api.v1.DenoiserService"
_Context: TypeAlias = "grpc.aio.ServicerContext[api.DenoiseLatentsRequest, api.DenoiseLatentsResponse]"


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A loaded model and what runs it."""

    engine: Engine
    model: Model
    workload: Workload
    limits: RequestLimits
    receive_timeout_seconds: float
    adapters: AdapterRegistry
    preparation: Worker
    """Where tensors are checked and noise is made: neither on the event loop nor between steps."""


class DenoiserServicer(denoiser_service_pb2_grpc.DenoiserServiceServicer):
    """Serves one denoiser; `denoiser` returns it once it is loaded, and calls come only then."""

    def __init__(self, denoiser: Callable[[], Denoiser]) -> None:
        self._denoiser = denoiser

    async def DenoiseLatents(  # type: ignore[override] # messages may come serialized
        self, request_iterator: AsyncIterator[api.DenoiseLatentsRequest], context: _Context
    ) -> AsyncIterator[Message]:
        denoiser = self._denoiser()
        request = _Request(denoiser, context.time_remaining())
        # Beside the finally, which waits for the generator's end when a call is cut off while it sends.
        context.add_done_callback(request.cancel)  # type: ignore[arg-type] # the stubs want a class
        try:
            timeout_seconds = denoiser.receive_timeout_seconds
            await receive(request_iterator, request.accept, timeout_seconds=timeout_seconds)
            await request.submit()
            async for response in request.responses():
                yield response
        finally:
            request.cancel()


class _Request:
    """One call: it reserves a place when its spec has come and takes it when its tensors have."""

    def __init__(self, denoiser: Denoiser, remaining_seconds: float | None) -> None:
        self._denoiser = denoiser
        self._outbox = EventChannel(asyncio.get_running_loop())
        clock = denoiser.engine.clock
        self._deadline = None if remaining_seconds is None else clock() + remaining_seconds
        self._reader = RequestReader(denoiser.model, denoiser.limits, self._reserve)
        self._reservation: tuple[Order, Job] | None = None
        self._adapters: asyncio.Task[tuple[ScaledAdapter, ...]] | None = None

    def accept(self, request: api.DenoiseLatentsRequest) -> None:
        """Takes the next part; raises what is wrong with it or, as soon as that is known, with an adapter."""
        self._reader.accept(request)
        if self._adapters is not None and self._adapters.done():
            self._adapters.result()

    def _reserve(self, order: Order) -> None:
        spec = self._denoiser.workload.expected(order, self._deadline)
        self._reservation = (order, self._denoiser.engine.admit(spec, self._outbox))
        if order.params.adapters:
            # They load while the tensors arrive.
            self._adapters = asyncio.create_task(self._denoiser.adapters.load(order.params.adapters))
            self._adapters.add_done_callback(_heard)

    async def submit(self) -> None:
        """Waits for the adapters, checks the tensors, makes the noise and joins the queue."""
        adapters = () if self._adapters is None else await self._adapters
        await self._denoiser.preparation.run(lambda: self._prepare(adapters))

    def _prepare(self, adapters: tuple[ScaledAdapter, ...]) -> None:
        conditioning = self._reader.finish()
        order, job = self._admitted()
        spec, run = self._denoiser.workload.prepared(order, self._deadline, conditioning, adapters)
        self._denoiser.engine.submit(job, spec, run)

    async def responses(self) -> AsyncIterator[Message]:
        """Yields everything that happens until the request is finished."""
        order, _ = self._admitted()
        messages = Responses(order.params.steps, order.resume_step)
        is_finished = False
        while not is_finished:
            for event in await self._outbox.take():
                is_finished = isinstance(event, Finished)
                for message in messages.of(event):
                    yield message

    def _admitted(self) -> tuple[Order, Job]:
        if self._reservation is None:
            raise RuntimeError("a request without a spec passed its checks")
        return self._reservation

    def cancel(self, _context: object = None) -> None:
        """Leaves at the next step boundary; no effect after the end."""
        if self._adapters is not None:
            self._adapters.cancel()
            # gRPC keeps the call's objects for a while; the adapters' memory must not wait for that.
            self._adapters = None
        if self._reservation is not None:
            self._denoiser.engine.cancel(self._reservation[1])


def _heard(adapters: asyncio.Task[tuple[ScaledAdapter, ...]]) -> None:
    """Takes note of a failure that nobody may be left to hear of."""
    if not adapters.cancelled():
        adapters.exception()
