"""DenoiserService: one linear handler that reads a request, admits it, submits it and streams its events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import grpc

from klein_api.v1 import denoiser_service_pb2 as api
from klein_api.v1 import denoiser_service_pb2_grpc
from klein_services.denoiser.adapters import AdapterRegistry
from klein_services.denoiser.engine import Engine
from klein_services.denoiser.events import EventChannel, Finished, Message, Responses
from klein_services.denoiser.request import (
    DenoiseLimits,
    DenoiseParams,
    ServedModel,
    TensorReader,
    parse_spec,
)
from klein_services.denoiser.request_planner import RequestPlanner
from klein_services.denoiser.scheduled_request import ScheduledRequest
from klein_services.denoiser.step_spans import StepSpans
from klein_services.runtime import tracing
from klein_services.runtime.request_parts import RequestParts, read_parts
from klein_services.runtime.stage import deadline_of
from klein_services.runtime.worker import Worker

SERVICE_NAME = "klein_api.v1.DenoiserService"
_Context: TypeAlias = "grpc.aio.ServicerContext[api.DenoiseLatentsRequest, api.DenoiseLatentsResponse]"


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """A loaded model with everything that serves its requests."""

    engine: Engine
    model: ServedModel
    planner: RequestPlanner
    limits: DenoiseLimits
    receive_timeout_seconds: float
    adapters: AdapterRegistry
    preparation: Worker
    """Thread that checks tensors and generates noise: work too slow for the event loop or between steps."""


class DenoiserServicer(denoiser_service_pb2_grpc.DenoiserServiceServicer):
    """Implements DenoiserService; called only while the stage serves, so `denoiser` is loaded."""

    def __init__(self) -> None:
        self.denoiser: Denoiser
        """Set once the model is loaded."""

    async def DenoiseLatents(  # type: ignore[override] # some messages are serialized already
        self, request_iterator: AsyncIterator[api.DenoiseLatentsRequest], context: _Context
    ) -> AsyncIterator[Message]:
        denoiser, deadline = self.denoiser, deadline_of(context)
        async with read_parts(request_iterator, timeout_seconds=denoiser.receive_timeout_seconds) as parts:
            params = parse_spec((await parts.spec_part()).spec, denoiser.model, denoiser.limits)
            request = denoiser.planner.scheduled_request(params, deadline)
            if tracing.enabled():
                request.spans = StepSpans(params.generation.steps - params.first_step, params.first_step)
            channel = EventChannel(asyncio.get_running_loop())
            request.connection = context.peer()
            with _admitted(denoiser.engine, request, channel, context):
                # Next to the reading, because clients wait for `queued` before they compute any tensor.
                receiving = asyncio.create_task(_submit(denoiser, request, params, parts, channel))
                try:
                    responses = Responses(params.generation.steps, params.first_step)
                    is_finished = False
                    while not is_finished:
                        for event in await channel.take():
                            is_finished = isinstance(event, Finished)
                            for message in responses.messages(event):
                                yield message
                finally:
                    receiving.cancel()
                    await asyncio.gather(receiving, return_exceptions=True)


@contextmanager
def _admitted(
    engine: Engine, request: ScheduledRequest, channel: EventChannel, context: _Context
) -> Iterator[None]:
    """Holds the request's place in the engine; cancels the request when the block or the call ends.

    Raises as `Engine.admit`.
    """
    engine.admit(request, channel)
    # In addition to the finally: while a response is being sent, gRPC ends the generator only after the call.
    context.add_done_callback(lambda _: engine.cancel(request))  # type: ignore[arg-type] # the stubs want a class
    try:
        yield
    finally:
        engine.cancel(request)
        if request.spans is not None:
            request.spans.close()


async def _submit(
    denoiser: Denoiser,
    request: ScheduledRequest,
    params: DenoiseParams,
    parts: RequestParts[api.DenoiseLatentsRequest],
    channel: EventChannel,
) -> None:
    """Reads the tensors while the adapters load, and submits both to the engine; a failure goes into the channel."""
    try:
        await _receive(denoiser, request, params, parts)
    except Exception as error:
        channel.fail(error)


async def _receive(
    denoiser: Denoiser,
    request: ScheduledRequest,
    params: DenoiseParams,
    parts: RequestParts[api.DenoiseLatentsRequest],
) -> None:
    reader = TensorReader(params, denoiser.model, denoiser.limits)
    loading = asyncio.create_task(denoiser.adapters.load(params.generation.adapters))
    # Retrieves the exception so asyncio does not warn "Task exception was never retrieved" if reading fails first.
    loading.add_done_callback(lambda task: task.cancelled() or task.exception())
    try:
        async for part in parts:
            if request.is_silent:
                denoiser.engine.received(request)
            if loading.done():
                loading.result()  # raises for an unusable adapter before all tensors have arrived
            reader.add(part)
        reader.require_complete()
        adapters = await loading
    finally:
        loading.cancel()
        # The traceback of its exception holds this frame, which must not hold it in turn.
        del loading

    def prepare() -> None:
        state = denoiser.planner.request_state(params, reader.tensors(), adapters)
        denoiser.engine.submit(request, state)

    await denoiser.preparation.run(prepare)
