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
from services.orchestrator.events import Event, EventQueue
from services.orchestrator.flow import Flow, FlowOptions
from services.orchestrator.request import ImageRequest, RequestLimits, validated
from services.orchestrator.routing import RoutingTable
from services.orchestrator.stages import StageDirectory
from services.runtime.errors import StageUnavailable
from services.runtime.logs import request_metadata
from services.runtime.metrics import IMAGES, PIXELS, REQUEST_SECONDS

_log = logging.getLogger("klein.orchestrator")


@dataclass
class Generation:
    """Makes images for callers."""

    table: RoutingTable
    channels: Channels
    directory: StageDirectory
    cache: TensorCache
    limits: RequestLimits = field(default_factory=RequestLimits)
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
            StageFailure: a stage failed in another way.
        """
        deadline = Deadline.after(remaining_seconds, self.maximum_seconds)
        route = self.table.route(spec.model)
        facts = await self.directory.facts(route, deadline.remaining_seconds())
        request = validated(spec, preview_interval_steps, route, facts, self.limits)
        if request.references and facts.reference_problem:
            raise StageUnavailable(facts.reference_problem)
        with _counted(request):
            queue = EventQueue()
            task = asyncio.create_task(self._run(request, deadline, queue, tells_progress))
            task.add_done_callback(lambda _: queue.close())
            try:
                async for event in queue:
                    yield event
                await task
            finally:
                task.cancel()
                await asyncio.wait([task])

    async def _run(
        self, request: ImageRequest, deadline: Deadline, queue: EventQueue, tells_progress: bool
    ) -> None:
        """Carries a request out, and once more if a stage was lost before the caller was told anything."""
        try:
            summary = await self._attempt(request, deadline, queue, tells_progress)
        except StageUnavailable:
            self.directory.forget(request.route)
            if queue.was_used:
                raise
            _log.warning("a stage was lost; the request is made again", exc_info=True)
            await self.directory.facts(request.route, deadline.remaining_seconds())
            summary = await self._attempt(request, deadline, queue, tells_progress)
        await queue.put(StreamGenerateImageResponse(summary=summary))

    async def _attempt(
        self, request: ImageRequest, deadline: Deadline, queue: EventQueue, tells_progress: bool
    ) -> GenerationSummary:
        calls = StageCalls(self.channels, deadline, request_metadata())
        options = FlowOptions(tells_progress, self.image_metadata)
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
def _counted(request: ImageRequest) -> Iterator[None]:
    """Counts a request's images by outcome; a cancelled request is neither a success nor a failure."""
    begin = time.perf_counter()
    outcome = "failed"
    try:
        yield
        outcome = "succeeded"
    except (asyncio.CancelledError, GeneratorExit):
        outcome = "cancelled"
        raise
    finally:
        labels = (request.route.name, request.flow, outcome)
        image_count = len(request.params.seeds)
        IMAGES.labels(*labels).inc(image_count)
        REQUEST_SECONDS.labels(*labels).observe(time.perf_counter() - begin)
        if outcome == "succeeded":
            PIXELS.labels(request.route.name, request.flow).inc(
                request.params.width_px * request.params.height_px * image_count
            )
