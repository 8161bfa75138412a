"""Generator of images for all clients: routes, checks, carries out and counts their requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import grpc

from klein_api.v1.image_service_pb2 import ImageSpec
from klein_core.errors import InvalidInput
from klein_services.orchestrator.backlog import Backlog
from klein_services.orchestrator.checkpoint_pace import CheckpointPace
from klein_services.orchestrator.events import Event, EventQueue, ImageEvent
from klein_services.orchestrator.generation import Generation
from klein_services.orchestrator.generation_span import (
    end_generation_span,
    open_generation_span,
    request_attributes,
)
from klein_services.orchestrator.image_release import ImageRelease
from klein_services.orchestrator.progress import GenerationOptions
from klein_services.orchestrator.quotas import Quotas
from klein_services.orchestrator.request import (
    AdmissionLimits,
    ImageRequest,
    flow_of,
    image_count,
    validated,
)
from klein_services.orchestrator.routing import RoutingTable
from klein_services.orchestrator.stage_channels import Channels
from klein_services.orchestrator.stage_client import Deadline, StageClient
from klein_services.orchestrator.stage_directory import StageDirectory
from klein_services.orchestrator.tensor_cache import TensorCache
from klein_services.orchestrator.tokens import Tenant
from klein_services.orchestrator.usage import RequestUsage, Usage
from klein_services.runtime import semantic_conventions as names
from klein_services.runtime import tracing
from klein_services.runtime.admission import ConcurrencyLimit
from klein_services.runtime.caller import caller, caller_metadata
from klein_services.runtime.errors import ContentDenied, ModelNotAllowed, ServiceError, StagesLost
from klein_services.runtime.logs import request_metadata
from klein_services.runtime.metrics import (
    DEADLINE_MISSED,
    IMAGES,
    PIXELS,
    REQUEST_SECONDS,
    exemplar,
    initialize_requests,
)
from klein_services.runtime.status import status_of
from klein_services.runtime.tracing import OpenSpan

_TRANSIT_SECONDS = 0.05
"""A client whose deadline passes disconnects at most this much before the deadline passes here."""
_CLIENT_MISTAKES = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION)
"""Codes of an unknown model or adapter and of an adapter that does not fit the model."""
_UNKNOWN_MODEL = "unknown"
"""Label of requests that name a model without a route."""
_log = logging.getLogger("klein.orchestrator")


@dataclass
class ImageGenerator:
    """Makes images for clients; holds what their requests share."""

    table: RoutingTable
    channels: Channels
    directory: StageDirectory
    cache: TensorCache
    limits: AdmissionLimits = field(default_factory=AdmissionLimits)
    slots: ConcurrencyLimit = field(default_factory=lambda: ConcurrencyLimit(256))
    """Requests that may be in progress."""
    maximum_seconds: float = 3600.0
    """Longest time that a request may take, also one without a deadline."""
    quotas: Quotas = field(default_factory=Quotas)
    usage: Usage = field(default_factory=Usage)
    image_metadata: bool = True
    """Whether the seed, model and steps are stored in the image files."""
    log_prompts: bool = False
    """Whether prompts are in logs and traces."""
    release: ImageRelease = field(default_factory=ImageRelease)
    """The checks and the signature of images."""
    resume_bytes: int = 0
    """Most bytes of one request's latents kept to resume it; 0 keeps none."""
    pace: CheckpointPace = field(default_factory=CheckpointPace)
    backlog: Backlog = field(default_factory=Backlog)
    """Work of the requests in progress, by pool of replicas."""

    def __post_init__(self) -> None:
        initialize_requests((*self.table.routes, _UNKNOWN_MODEL))

    def use(self, table: RoutingTable) -> None:
        """Routes the requests that come from now on by another table; those in progress keep their stages."""
        self.table = table
        self.directory.retain(table.addresses)
        self.backlog.retain(table.addresses)
        self.channels.retain(table.addresses)

    async def events(
        self,
        spec: ImageSpec,
        *,
        remaining_seconds: float | None,
        preview_interval_steps: int = 0,
        reports_progress: bool = True,
    ) -> AsyncGenerator[Event, None]:
        """Yields a request's events; closing the iterator cancels every stage call.

        Args:
            spec: the client's request.
            remaining_seconds: time until the client's deadline; `None` without one.
            preview_interval_steps: a preview after every so many steps; 0 means none.
            reports_progress: whether queue positions and steps are events, besides images and the summary.

        Raises:
            UnknownModel: the request names a model that is not routed.
            ModelNotAllowed: the caller's token does not allow the model.
            InvalidInput: fields are outside their limits; all of them are named.
            QueueFull: the orchestrator holds as many requests as it may.
            QuotaExceeded: the quota of the caller's token is used up.
            StagesLost: a stage cannot be used.
            ContentDenied: the content policy refuses the request or an image.
            ContentPolicyFailed: it gave no decision.
            PeerFailure: a stage failed in another way.
            StageDisagreement: a stage broke the protocol between stages.
        """
        options = GenerationOptions(
            reports_progress, self.image_metadata, self.release, resume_bytes=self.resume_bytes
        )
        deadline = Deadline.after(remaining_seconds, self.maximum_seconds)
        table = self.visible_table()
        current = caller.get()
        model = spec.model or table.default_model
        # Clients choose neither the labels and names nor how far to count.
        model = model if model in table.routes else _UNKNOWN_MODEL
        usage = RequestUsage(model, flow_of(spec), len(spec.references))
        with self._counted(spec, usage, deadline, options.arrived_at) as span, ExitStack() as stack:
            stack.enter_context(self.slots.slot(current.name if isinstance(current, Tenant) else ""))
            if isinstance(current, Tenant):
                stack.enter_context(self.quotas.place(current))
            route = table.route(spec.model)
            stack.enter_context(self.channels.used(*route.stages))
            # Never across a `yield`, where it would be the caller's current span.
            with span.current():
                with tracing.span(names.DESCRIBE_STAGES):
                    info = await self.directory.describe_route(route, deadline.remaining_seconds())
                request = validated(spec, preview_interval_steps, route, info, self.limits)
                if span:
                    span.set(request_attributes(request, is_streamed=reports_progress))
                if self.log_prompts:
                    _log_prompts(request, span)
                usage.step_count = request.params.steps
                if isinstance(current, Tenant):
                    usage.charge = self.quotas.charge(current, request.most_pixel_count / 1e6)
                await self.release.check_request(request, deadline)
                wants_previews = request.preview_interval_steps > 0
                warnings = self.release.warnings(request, wanted_previews=wants_previews)
                options = replace(options, warnings=tuple(warnings))
                if not self.release.allows_previews:
                    request = replace(request, preview_interval_steps=0)
                queue = EventQueue()
                metadata = (*request_metadata(), *caller_metadata())
                stages = StageClient(self.channels, deadline, metadata, self.backlog)
                generation = Generation(
                    request, stages, self.directory, self.cache, queue, options, self.pace
                )
                task = asyncio.create_task(generation.run())
            task.add_done_callback(lambda _: queue.close())
            try:
                async for event in queue:
                    if isinstance(event, ImageEvent) and not event.is_preview:
                        image = event.description
                        PIXELS.labels(route.name, request.flow).inc(image.width_px * image.height_px)
                        usage.image_count += 1
                        usage.output_megapixels += image.width_px * image.height_px / 1e6
                    yield event
                await task
            finally:
                queue.abandoned = True
                task.cancel()
                # The client is gone; ignore how the cancelled task ends.
                await asyncio.gather(task, return_exceptions=True)
                # Known for certain once the attempt has ended.
                usage.input_megapixels = generation.progress.input_pixel_count / 1e6
                usage.asked_megapixels = generation.progress.asked_pixel_count / 1e6

    def visible_table(self) -> RoutingTable:
        """Returns the rows that the current request's caller may use."""
        current = caller.get()
        models = current.models if isinstance(current, Tenant) else None
        return self.table if models is None else self.table.limited_to(models)

    @contextmanager
    def _counted(
        self, spec: ImageSpec, usage: RequestUsage, deadline: Deadline, arrived_at: float
    ) -> Iterator[OpenSpan]:
        """Counts a request's images, time and use by outcome, from its arrival on; yields the request's span."""
        outcome = "succeeded"
        span = open_generation_span(usage.model)
        try:
            yield span
        except BaseException as error:
            outcome = _outcome(error, deadline)
            end_generation_span(span, outcome, error)
            raise
        else:
            span.end(grpc.StatusCode.OK)
        finally:
            labels = (usage.model, usage.flow, outcome)
            IMAGES.labels(*labels).inc(min(max(image_count(spec), 1), self.limits.image_count))
            seconds = time.perf_counter() - arrived_at
            REQUEST_SECONDS.labels(*labels).observe(seconds, exemplar())
            usage.settle(outcome)
            self.usage.record(caller.get(), usage, outcome, seconds)
            if outcome == "expired":
                DEADLINE_MISSED.labels("orchestrator").inc()


def _log_prompts(request: ImageRequest, span: OpenSpan) -> None:
    """Adds the prompts to the log and to the request's span."""
    prompts = {"prompt": request.params.prompt}
    if request.params.negative_prompt is not None:
        prompts["negative_prompt"] = request.params.negative_prompt
    _log.info("prompt", extra=prompts)
    messages = names.input_messages(request.params.prompt, request.params.negative_prompt)
    span.set({names.GEN_AI_INPUT_MESSAGES: messages})


def _outcome(error: BaseException, deadline: Deadline) -> str:
    """Returns the outcome under which a request that raised `error` is counted."""
    is_late = deadline.remaining_seconds() < _TRANSIT_SECONDS
    match error:
        case asyncio.CancelledError() | GeneratorExit():
            return "expired" if is_late else "cancelled"
        case InvalidInput() | ModelNotAllowed() | ContentDenied():
            return "rejected"
        case StagesLost() if is_late:
            # A stage that did not answer within what was left of the deadline.
            return "expired"
        case ServiceError():
            code = status_of(error).code
            if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                return "expired"
            if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                return "refused"
            return "rejected" if code in _CLIENT_MISTAKES else "failed"
        case _:
            return "failed"
