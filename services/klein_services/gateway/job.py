"""Jobs: requests for images that outlive the call that made them, and their values in the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class JobState(StrEnum):
    """State of a job. The last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"

    @property
    def final(self) -> bool:
        """Whether the job will not change any more."""
        return self in FINAL_STATES


FINAL_STATES = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELED)
OPEN_STATES = (JobState.QUEUED, JobState.RUNNING)


class WebhookEvent(StrEnum):
    """Moment of a job's life at which its webhook is called."""

    START = "start"
    OUTPUT = "output"
    LOGS = "logs"
    COMPLETED = "completed"


@dataclass(frozen=True, kw_only=True)
class Webhook:
    """Receiver of a job's events."""

    url: str
    secret: str | None = None
    """Key of the signature; `None` takes the gateway's, if it has one."""
    events: frozenset[WebhookEvent] = frozenset({WebhookEvent.COMPLETED})


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job as an API makes it."""

    owner: str
    """Key that made the job; for all others it does not exist."""
    api: str
    """API whose form the job's answers have."""
    request: Mapping[str, Any]
    """Parameters of the images as JSON, with a seed: whatever run of the job makes the same images."""
    echo: Mapping[str, Any] = field(default_factory=dict)
    """Values of the request that the API's answers repeat, as JSON."""
    files: Sequence[bytes] = ()
    """Image files that `request` names by their position."""
    idempotency_key: str | None = None
    webhook: Webhook | None = None
    credential: str | None = None
    """Sealed token that the run of the job presents to the orchestrator."""


@dataclass(frozen=True, kw_only=True)
class JobError:
    """The reason why a job failed."""

    code: str
    """gRPC's status name, such as INVALID_ARGUMENT, or EXPIRED, ABANDONED or CONTENT_DENIED."""
    message: str
    violations: Sequence[Mapping[str, str]] = ()
    """Fields that are wrong, each with `field` and `description`."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as it is in the store; times are seconds since 1970 by the store's clock."""

    id: str
    owner: str
    api: str
    idempotency_key: str | None
    request: Mapping[str, Any]
    echo: Mapping[str, Any]
    credential: str | None
    state: JobState
    created_at: float
    deadline_at: float
    """Time at which the job fails unless it has ended."""
    started_at: float | None
    """Begin of its last run."""
    completed_at: float | None
    expires_at: float | None
    """Time at which the job and its images are deleted; `None` until it has ended."""
    attempts: int
    """Runs that were begun and not given back to the queue on purpose."""
    step: int
    step_count: int
    result: Mapping[str, Any] | None
    error: JobError | None
    webhook: Webhook | None


@dataclass(frozen=True, kw_only=True)
class LeasedJob:
    """A job that this gateway runs."""

    job: Job
    lease: str
    """Token of the lease; another gateway that takes the job over has another one."""
    files: Sequence[bytes]
    taken_over: bool
    """Whether the gateway that ran it before has stopped without giving it back."""


class JobStoreError(Exception):
    """An operation of the job store was refused or failed."""


class StoreUnavailable(JobStoreError):
    """The database does not answer, is locked or cannot be written."""


class QueueFull(JobStoreError):
    """There are as many open jobs as are allowed.

    Args:
        limit: the most allowed.
        of_owner: whether the limit is that of one key, not of all together.
    """

    def __init__(self, limit: int, *, of_owner: bool) -> None:
        self.limit = limit
        self.of_owner = of_owner
        whose = "this key has" if of_owner else "there are"
        super().__init__(
            f"{whose} {limit} jobs that have not ended, the most allowed; try again when one has"
        )


class IdempotencyConflict(JobStoreError):
    """The idempotency key belongs to a job that was made by another request."""

    def __init__(self) -> None:
        super().__init__("the idempotency key was used for another request; take a new one for each request")


class JobNotFound(JobStoreError):
    """There is no such job for this key."""
