"""One request as the scheduler sees it: how urgent, how large, how far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

from klein_services.runtime import metrics


class Urgency(IntEnum):
    """Priority classes, the most urgent first."""

    INTERACTIVE = 0
    STANDARD = 1
    BATCH = 2


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """The keys and values of references that a request's images attend to."""

    key: str
    """Equal where the content is."""
    tokens: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What a request asks of the device. Times are seconds on the caller's monotonic clock."""

    image_tokens: int
    """Tokens of one image's share of a step: text, target and references, twice with guidance."""
    step_count: int
    """Steps of the whole schedule."""
    image_count: int = 1
    first_step: int = 0
    """Steps that were done elsewhere."""
    urgency: Urgency = Urgency.STANDARD
    deadline: float | None = None
    memory_bytes: int = 0
    """What the request's tensors hold from admission to its end."""
    cache: CacheSpec | None = None
    """What must be there before the first step."""

    @property
    def unit_count(self) -> int:
        """Units of work: one image, one step."""
        return self.image_count * (self.step_count - self.first_step)


@dataclass(eq=False)
class Job:
    """One admitted request. A unit is one step of one image; the images of a request step in turn."""

    spec: JobSpec
    sequence: int
    """Order of admission."""
    admitted_at: float
    is_ready: bool = False
    """Whether its tensors are here, so that it may be chosen."""
    is_cancelled: bool = False
    has_cache: bool = False
    """Whether it uses the cache that its spec names, which stays until it leaves."""
    units_done: int = 0
    started_at: float | None = None
    spent_seconds: float = 0.0
    """Its share of the device's time so far."""

    @property
    def order(self) -> tuple[int, float, int]:
        """Sort key: class, then earliest deadline, then first come."""
        deadline = math.inf if self.spec.deadline is None else self.spec.deadline
        return (self.spec.urgency, deadline, self.sequence)

    @property
    def units_left(self) -> int:
        return self.spec.unit_count - self.units_done

    @property
    def steps_done(self) -> int:
        """Steps that all of its images have done, those before `first_step` included."""
        return self.spec.first_step + self.units_done // self.spec.image_count

    @property
    def next_image(self) -> int:
        return self.units_done % self.spec.image_count

    @property
    def units_left_in_step(self) -> int:
        """Images that have not done the current step."""
        return min(self.units_left, self.spec.image_count - self.next_image)

    @property
    def needs_cache(self) -> bool:
        """Whether it cannot step yet."""
        return self.spec.cache is not None and not self.has_cache

    @property
    def is_started(self) -> bool:
        return self.started_at is not None

    @property
    def is_finished(self) -> bool:
        return self.units_left == 0

    def is_expired(self, now: float) -> bool:
        """Whether its deadline has passed."""
        return self.spec.deadline is not None and now >= self.spec.deadline

    def is_unwanted(self, now: float) -> bool:
        """Whether nobody waits for it any more."""
        return self.is_cancelled or self.is_expired(now)


@dataclass(frozen=True)
class Unit:
    """One step of one image, or the computation of its request's reference cache."""

    job: Job
    image: int | None
    """Index of the image; `None` computes the cache."""

    @property
    def tokens(self) -> int:
        spec = self.job.spec
        return spec.cache.tokens if self.image is None and spec.cache else spec.image_tokens


@dataclass(frozen=True)
class Plan:
    """What the device does next."""

    units: tuple[Unit, ...]
    """Caches are computed before the images step, so a request's images follow in a later plan."""
    starting: tuple[Job, ...] = ()
    """Requests that the device sees for the first time."""
    is_aged_turn: bool = False
    """Whether it was led by a request that others had kept waiting."""
    passes_over: bool = False
    """Whether a request that has waited long waits on."""

    @property
    def tokens(self) -> int:
        return sum(unit.tokens for unit in self.units)


STAGE = "denoiser"
OPERATION = "denoise"


def observe_step(plan: Plan, seconds: float, token_budget: int) -> None:
    """Books one step. Without a budget an image fills its step."""
    metrics.STEP_SECONDS.observe(seconds)
    metrics.STEP_TOKENS.observe(plan.tokens)
    metrics.STEP_REQUESTS.observe(len({unit.job.sequence for unit in plan.units}))
    metrics.STEP_OCCUPANCY.set(plan.tokens / max(token_budget, plan.tokens))


def observe_budget(tokens: int) -> None:
    metrics.STEP_TOKEN_BUDGET.set(tokens)


def observe_load(queued_count: int, running_count: int) -> None:
    metrics.QUEUE_DEPTH.labels(STAGE).set(queued_count)
    metrics.RUNNING.labels(STAGE).set(running_count)


def observe_started(queue_seconds: float) -> None:
    metrics.QUEUE_WAIT_SECONDS.labels(STAGE).observe(queue_seconds)


def observe_finished(job: Job) -> None:
    metrics.STAGE_SECONDS.labels(STAGE, OPERATION).observe(job.spent_seconds)


def observe_abandoned(job: Job, *, is_late: bool) -> None:
    """Books a request that nobody waited for when it left."""
    metrics.ABANDONED_SECONDS.labels(STAGE).inc(job.spent_seconds)
    if is_late:
        metrics.DEADLINE_MISSED.labels(STAGE).inc()
