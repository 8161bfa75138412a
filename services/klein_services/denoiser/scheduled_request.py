"""ScheduledRequest, WorkItem and Batch: the scheduler's view of requests and steps, and their metrics. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from klein_services.denoiser.step_spans import StepSpans
from klein_services.runtime import metrics
from klein_services.runtime.caller import NO_CALLER, Caller
from klein_services.runtime.urgency import Urgency

STAGE = "denoiser"
OPERATION = "denoise"


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """The reference cache that a request's images attend to."""

    key: str
    """Digest of everything the cache is computed from: equal keys mean equal content."""
    tokens: int
    """Reference tokens in the cache."""
    size_bytes: int


@dataclass(eq=False, kw_only=True)
class ScheduledRequest:
    """One request as the scheduler sees it: its cost, its urgency and its progress.

    Times are seconds on the engine's monotonic clock. Before the tensors arrive, `image_tokens` and `memory_bytes`
    are lower bounds computed from the spec, and `cache` is `None`; `Scheduler.activate` sets the actual values.
    """

    image_tokens: int
    """Tokens of one step of one image: text, target and references, twice with guidance."""
    step_count: int
    """Steps of the whole schedule."""
    image_count: int = 1
    first_step: int = 0
    """Steps that are not run: those done before this request resumes, or left out by its strength."""
    urgency: Urgency = Urgency.STANDARD
    deadline: float | None = None
    memory_bytes: int = 0
    """Bytes of the request's tensors, held from admission to its end."""
    cache: CacheSpec | None = None
    """Reference cache needed before the first step."""
    caller: Caller = NO_CALLER
    """Requests of a class share the device by their callers."""
    is_resumed: bool = False
    """Whether another replica did the steps before `first_step`."""
    connection: str = ""
    """The connection that the request came on."""

    sequence: int = 0
    """Order of admission."""
    place: float = 0.0
    """Place among equals: that of its admission, but of a resumed request before those that wait."""
    admitted_at: float = 0.0
    is_silent: bool = True
    """Whether nothing came after the spec yet."""
    is_ready: bool = False
    """Whether the tensors are here, so that the request may be scheduled."""
    is_cancelled: bool = False
    has_cache: bool = False
    """Whether the request holds a reference to `cache`, which it releases when it leaves."""
    items_done: int = 0
    started_at: float | None = None
    spent_seconds: float = 0.0
    """This request's share of device time so far."""
    turn: float | None = None
    """Its caller's start tag when it began; `None` while its caller has to share before it goes on."""
    charged_seconds: float = 0.0
    """Device time that its caller was charged: in a turn also what the request still needs."""
    exemplar: dict[str, str] | None = field(default_factory=metrics.exemplar)
    """Links this request's observations, which the engine's thread makes, to its trace."""
    spans: StepSpans | None = None
    """Spans of the request; `None` while tracing is off."""

    @property
    def due(self) -> tuple[float, float, int]:
        """Order among the requests of one caller and class: earliest deadline, then first come, first served."""
        return (math.inf if self.deadline is None else self.deadline, self.place, self.sequence)

    @property
    def items_left(self) -> int:
        """Work items not done yet."""
        return self.image_count * (self.step_count - self.first_step) - self.items_done

    @property
    def steps_done(self) -> int:
        """Steps that all images have done, `first_step` included."""
        return self.first_step + self.items_done // self.image_count

    @property
    def next_image(self) -> int:
        """Index of the image that steps next; the images of a request step in turn."""
        return self.items_done % self.image_count

    @property
    def images_left_in_step(self) -> int:
        """Images that have not done the current step."""
        return min(self.items_left, self.image_count - self.next_image)

    @property
    def needs_cache(self) -> bool:
        """Whether the request cannot step until it gets its reference cache."""
        return self.cache is not None and not self.has_cache

    @property
    def is_started(self) -> bool:
        return self.started_at is not None

    @property
    def is_finished(self) -> bool:
        return self.items_left == 0

    def is_expired(self, now: float) -> bool:
        """Returns whether the deadline has passed."""
        return self.deadline is not None and now >= self.deadline

    def is_abandoned(self, now: float) -> bool:
        """Returns whether the client no longer waits for the result."""
        return self.is_cancelled or self.is_expired(now)


@dataclass(frozen=True)
class WorkItem:
    """One step of one image, or the computation of a request's reference cache."""

    request: ScheduledRequest
    image: int | None
    """Index of the image; `None` computes the cache."""

    @property
    def tokens(self) -> int:
        cache = self.request.cache
        return cache.tokens if self.image is None and cache else self.request.image_tokens


@dataclass(frozen=True)
class Batch:
    """Work items that the device does in one step."""

    items: tuple[WorkItem, ...]
    """Caches are computed before the images step, so a request's first step is in a batch after its cache."""
    starting: tuple[ScheduledRequest, ...] = ()
    """Requests whose first work item is in this batch."""
    is_starving_turn: bool = False
    """Whether a starving request leads the batch ahead of more urgent ones."""
    skips_starving: bool = False
    """Whether the oldest starving request is not in the batch."""

    @property
    def tokens(self) -> int:
        return sum(item.tokens for item in self.items)


def observe_step(batch: Batch, seconds: float, token_budget: int) -> None:
    """Records one step. Without a token budget one image counts as a full step."""
    requests = {item.request.sequence: item.request for item in batch.items}
    metrics.STEP_SECONDS.labels(STAGE).observe(seconds)
    metrics.STEP_TOKENS.labels(STAGE).observe(batch.tokens)
    metrics.STEP_REQUESTS.labels(STAGE).observe(len(requests))
    metrics.STEP_OCCUPANCY.labels(STAGE).set(batch.tokens / max(token_budget, batch.tokens))
    for request in requests.values():
        if request.spans is not None:
            request.spans.stepped(request.steps_done, seconds, len(requests), batch.tokens)


def observe_budget(tokens: int) -> None:
    """Records the current token budget of a step."""
    metrics.STEP_TOKEN_BUDGET.labels(STAGE).set(tokens)


def observe_load(queued_count: int, running_count: int, backlog_seconds: float) -> None:
    """Records how many requests wait, how many have started, and the device time that all of them still need."""
    metrics.QUEUE_DEPTH.labels(STAGE).set(queued_count)
    metrics.RUNNING.labels(STAGE).set(running_count)
    metrics.BACKLOG_SECONDS.labels(STAGE).set(backlog_seconds)


def observe_started(request: ScheduledRequest, queue_seconds: float) -> None:
    """Records the time from a request's admission to its first step."""
    metrics.QUEUE_WAIT_SECONDS.labels(STAGE).observe(queue_seconds, request.exemplar)
    if request.spans is not None:
        request.spans.started(queue_seconds)


def observe_finished(request: ScheduledRequest) -> None:
    """Records the device time of a finished request."""
    metrics.STAGE_SECONDS.labels(STAGE, OPERATION).observe(request.spent_seconds, request.exemplar)


def observe_abandoned(request: ScheduledRequest, *, is_late: bool) -> None:
    """Records the device time of a request that was cancelled or missed its deadline."""
    metrics.ABANDONED_SECONDS.labels(STAGE).inc(request.spent_seconds)
    if is_late:
        metrics.DEADLINE_MISSED.labels(STAGE).inc()
