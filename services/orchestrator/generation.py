"""From a caller's request to its events: routing, checks, the flow, and what is counted of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from klein_api.v1.image_service_pb2 import GenerationSummary, ImageSpec, StreamGenerateImageResponse
from services.orchestrator.cache import TensorCache
from services.orchestrator.calls import Channels, StageCalls
from services.orchestrator.deadline import Deadline
from services.orchestrator.events import Event, EventQueue, ImageEvent
from services.orchestrator.flow import Flow, FlowOptions
from services.orchestrator.request import ImageRequest, RequestLimits, validated
from services.orchestrator.routing import RoutingTable
from services.orchestrator.stages import StageDirectory
from services.runtime.errors import StageUnavailable
from services.runtime.logs import request_metadata
from services.runtime.metrics import IMAGES, PIXELS, REQUEST_SECONDS
from services.runtime.places import Places

_log = logging.getLogger("klein.orchestrator")


@dataclass
class Generation:
    """Makes images for callers."""

    table: RoutingTable
    channels: Channels
    directory: StageDirectory
    cache: TensorCache
    limits: RequestLimits = field(default_factory=RequestLimits)
    places: Places = field(default_factory=lambda: Places(256))
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
            StageUnavailable: a stage cannot be used.
            PeerFailure: a stage failed in another way.
        """
        options = FlowOptions(tells_progress, self.image_metadata)
        deadline = Deadline.after(remaining_seconds, self.maximum_seconds)
        route = self.table.route(spec.model)
        facts = await self.directory.facts(route, deadline.remaining_seconds())
        request = validated(spec, preview_interval_steps, route, facts, self.limits)
        if request.references and facts.reference_problem:
            raise StageUnavailable(facts.reference_problem)
        with _counted(request, options.arrived_at):
            queue = EventQueue()
            task = asyncio.create_task(self._run(request, deadline, queue, options))
            task.add_done_callback(lambda _: queue.close())
            try:
                async for event in queue:
                    _count_pixels(request, event)
                    yield event
                await task
            finally:
                task.cancel()
                await asyncio.wait([task])

    async def _run(
        self, request: ImageRequest, deadline: Deadline, queue: EventQueue, options: FlowOptions
    ) -> None:
        """Carries a request out, and once more if a stage was lost before the caller was told anything."""
        try:
            summary = await self._attempt(request, deadline, queue, options)
        except StageUnavailable:
            self.directory.forget(request.route)
            if queue.was_used:
                raise
            _log.warning("a stage was lost; the request is made again", exc_info=True)
            await self.directory.facts(request.route, deadline.remaining_seconds())
            summary = await self._attempt(request, deadline, queue, options)
        await queue.put(StreamGenerateImageResponse(summary=summary))

    async def _attempt(
        self, request: ImageRequest, deadline: Deadline, queue: EventQueue, options: FlowOptions
    ) -> GenerationSummary:
        calls = StageCalls(self.channels, deadline, request_metadata())
        try:
            return await Flow(request, calls, self.cache, queue.put, options).run()
        except ExceptionGroup as group:
            raise _first(group) from None


def _first(group: ExceptionGroup[Exception]) -> Exception:
    """Returns what failed first; what failed later did so while it was being cancelled."""
    error: Exception = group
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


@contextmanager
def _counted(request: ImageRequest, arrived_at: float) -> Iterator[None]:
    """Counts a request's images by outcome; a cancelled request is neither a success nor a failure."""
    outcome = "failed"
    try:
        yield
        outcome = "succeeded"
    except (asyncio.CancelledError, GeneratorExit):
        outcome = "cancelled"
        raise
    finally:
        labels = (request.route.name, request.flow, outcome)
        IMAGES.labels(*labels).inc(len(request.params.seeds))
        REQUEST_SECONDS.labels(*labels).observe(time.perf_counter() - arrived_at)


def _count_pixels(request: ImageRequest, event: Event) -> None:
    if isinstance(event, ImageEvent) and not event.is_preview:
        pixel_count = event.description.width_px * event.description.height_px
        PIXELS.labels(request.route.name, request.flow).inc(pixel_count)
