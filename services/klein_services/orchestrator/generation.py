"""From a caller's request to its events: routing, checks, the flow, and what is counted of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import grpc

from klein_api.v1.image_service_pb2 import GenerationSummary, ImageSpec, StreamGenerateImageResponse
from klein_core.errors import InvalidInput
from klein_services.orchestrator.cache import TensorCache
from klein_services.orchestrator.events import Event, EventQueue, ImageEvent
from klein_services.orchestrator.flow import Flow, FlowOptions
from klein_services.orchestrator.request import ImageRequest, RequestLimits, flow_of, image_count, validated
from klein_services.orchestrator.routing import RoutingTable
from klein_services.orchestrator.stage_client import Channels, Deadline, StageClient
from klein_services.orchestrator.stage_directory import StageDirectory
from klein_services.runtime.admission import ConcurrencyLimit
from klein_services.runtime.errors import ServiceError, StagesLost
from klein_services.runtime.logs import request_metadata
from klein_services.runtime.metrics import DEADLINE_MISSED, IMAGES, PIXELS, REQUEST_SECONDS
from klein_services.runtime.status import status_of

_TRANSIT_SECONDS = 0.05
"""A caller whose deadline passes hangs up this much before the deadline passes here, at most."""
_CLIENT_MISTAKES = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION)
"""Codes of an unknown model or adapter and of an adapter that does not fit the model."""
_UNKNOWN_MODEL = "unknown"
"""Label of requests that name a model without a route."""
_log = logging.getLogger("klein.orchestrator")


@dataclass
class Generation:
    """Makes images for callers."""

    table: RoutingTable
    channels: Channels
    directory: StageDirectory
    cache: TensorCache
    limits: RequestLimits = field(default_factory=RequestLimits)
    slots: ConcurrencyLimit = field(default_factory=lambda: ConcurrencyLimit(256))
    """Requests that may be in progress."""
    maximum_seconds: float = 3600.0
    """Longest time that a request may take, also one without a deadline."""
    image_metadata: bool = True
    """Whether the seed, model and steps are stored in the image files."""

    async def events(
        self,
        spec: ImageSpec,
        *,
        remaining_seconds: float | None,
        preview_interval_steps: int = 0,
        tells_progress: bool = True,
    ) -> AsyncGenerator[Event, None]:
        """Yields a request's events; closing the iterator cancels every stage call.

        Args:
            spec: what is to be made.
            remaining_seconds: how long the caller waits; `None` means for ever.
            preview_interval_steps: a preview after every so many steps; 0 means none.
            tells_progress: whether there are events besides images and the summary.

        Raises:
            UnknownModel: the request names a model that is not routed.
            InvalidInput: fields are outside their limits; all of them are named.
            StagesLost: a stage cannot be used.
            PeerFailure: a stage failed in another way.
        """
        options = FlowOptions(tells_progress, self.image_metadata)
        deadline = Deadline.after(remaining_seconds, self.maximum_seconds)
        with self._counted(spec, deadline, options.arrived_at):
            route = self.table.route(spec.model)
            facts = await self.directory.facts(route, deadline.remaining_seconds())
            request = validated(spec, preview_interval_steps, route, facts, self.limits)
            if request.references and facts.reference_problem:
                raise StagesLost(facts.reference_problem)
            queue = EventQueue()
            task = asyncio.create_task(self._run(request, deadline, queue, options))
            task.add_done_callback(lambda _: queue.close())
            try:
                async for event in queue:
                    _count_pixels(request, event)
                    yield event
                await task
            finally:
                queue.abandoned = True
                task.cancel()
                # The client is gone; ignore how the cancelled task ends.
                await asyncio.gather(task, return_exceptions=True)

    @contextmanager
    def _counted(self, spec: ImageSpec, deadline: Deadline, arrived_at: float) -> Iterator[None]:
        """Counts a request's images and its duration by outcome, from its arrival on."""
        outcome = "succeeded"
        try:
            yield
        except BaseException as error:
            outcome = _outcome(error, deadline)
            raise
        finally:
            model = spec.model or self.table.default_model
            # Clients choose neither the labels nor how far to count.
            labels = (model if model in self.table.routes else _UNKNOWN_MODEL, flow_of(spec), outcome)
            IMAGES.labels(*labels).inc(min(max(image_count(spec), 1), self.limits.image_count))
            REQUEST_SECONDS.labels(*labels).observe(time.perf_counter() - arrived_at)
            if outcome == "expired":
                DEADLINE_MISSED.labels("orchestrator").inc()

    async def _run(
        self, request: ImageRequest, deadline: Deadline, queue: EventQueue, options: FlowOptions
    ) -> None:
        """Carries a request out, and once more if a stage was lost before the caller was told anything."""
        try:
            summary = await self._attempt(request, deadline, queue, options)
        except StagesLost:
            self.directory.forget(request.route)
            if queue.was_used:
                raise
            _log.warning("a stage was lost; the request is made again", exc_info=True)
            summary = await self._attempt(await self._renewed(request, deadline), deadline, queue, options)
        await queue.put(StreamGenerateImageResponse(summary=summary))

    async def _renewed(self, request: ImageRequest, deadline: Deadline) -> ImageRequest:
        """Returns the request for the stages as they are now, which may have other weights than before."""
        facts = await self.directory.facts(request.route, deadline.remaining_seconds())
        if not facts.takes_the_same(request.facts):
            raise StagesLost(f"another model took the place of {request.route.name!r} meanwhile; ask again")
        return replace(request, facts=facts)

    async def _attempt(
        self, request: ImageRequest, deadline: Deadline, queue: EventQueue, options: FlowOptions
    ) -> GenerationSummary:
        calls = StageClient(self.channels, deadline, request_metadata())
        try:
            return await Flow(request, calls, self.cache, queue.put, options).run()
        except ExceptionGroup as group:
            if queue.abandoned:
                # Stage calls that our own cancellation ended may fail first, and a task group then raises their
                # errors in place of the cancellation. A second attempt would never be read.
                raise asyncio.CancelledError from None
            raise _first(group) from None


def _first(group: ExceptionGroup[Exception]) -> Exception:
    """Returns what failed first; what failed later did so while it was being cancelled."""
    error: Exception = group
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _outcome(error: BaseException, deadline: Deadline) -> str:
    """Returns how a request that raised `error` is counted."""
    is_late = deadline.remaining_seconds() < _TRANSIT_SECONDS
    match error:
        case asyncio.CancelledError() | GeneratorExit():
            return "expired" if is_late else "cancelled"
        case InvalidInput():
            return "rejected"
        case StagesLost() if is_late:
            # A stage that did not answer within what was left of the deadline.
            return "expired"
        case ServiceError():
            code = status_of(error).code
            if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                return "expired"
            return "rejected" if code in _CLIENT_MISTAKES else "failed"
        case _:
            return "failed"


def _count_pixels(request: ImageRequest, event: Event) -> None:
    if isinstance(event, ImageEvent) and not event.is_preview:
        pixel_count = event.description.width_px * event.description.height_px
        PIXELS.labels(request.route.name, request.flow).inc(pixel_count)
