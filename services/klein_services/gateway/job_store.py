"""Job store: the jobs of all keys as clients make, read and cancel them, and their deletion."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import delete, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from klein_services.gateway.job import (
    OPEN_STATES,
    IdempotencyConflict,
    Job,
    JobError,
    JobNotFound,
    JobState,
    NewJob,
    QueueFull,
    WebhookEvent,
)
from klein_services.gateway.job_database import DELIVERIES, JOB_FILES, JOBS, JobDatabase, clock
from klein_services.gateway.job_rows import COLUMNS, WebhookBody, job_of, new_id, post_events, webhook_json

DELETED_AT_ONCE = 100
"""Most jobs that one clean-up deletes or ends, so that it holds the database for moments only."""


@dataclass(frozen=True, kw_only=True)
class JobLimits:
    """Bounds of the store; seconds where nothing else is written."""

    open_jobs: int = 1000
    """Jobs of all keys that have not ended."""
    open_jobs_of_owner: int = 100
    """Jobs of one key that have not ended."""
    job_seconds: float = 3600.0
    """Time within which a job must end."""
    retention_seconds: float = 86400.0
    """Time for which an ended job and its images are kept."""


@dataclass(frozen=True)
class JobPage:
    """Jobs of one key, the latest first."""

    jobs: Sequence[Job]
    next: tuple[float, str] | None
    """Where the next page begins."""


class JobStore:
    """Jobs of the database.

    Args:
        database: an open database.
        limits: bounds of the store.
        webhook_body: body of the calls of webhooks.
    """

    def __init__(self, database: JobDatabase, limits: JobLimits, webhook_body: WebhookBody) -> None:
        self._database = database
        self._limits = limits
        self._webhook_body = webhook_body

    async def create(self, new: NewJob) -> tuple[Job, bool]:
        """Puts a job into the queue, or returns the one that the same request has made.

        Returns:
            The job, and whether it was made now.

        Raises:
            IdempotencyConflict: another request has used the key.
            QueueFull: too many jobs have not ended.
            StoreUnavailable: the database failed.
        """
        digest = request_digest(new)

        async def work(connection: AsyncConnection) -> tuple[Job, bool]:
            if new.idempotency_key is not None:
                same_key = (JOBS.c.owner == new.owner) & (JOBS.c.idempotency_key == new.idempotency_key)
                row = (await connection.execute(select(*COLUMNS, JOBS.c.digest).where(same_key))).first()
                if row is not None:
                    if row.digest != digest:
                        raise IdempotencyConflict
                    return job_of(row), False
            await self._require_place(connection, new.owner)
            values = {
                "id": new_id(),
                "owner": new.owner,
                "api": new.api,
                "idempotency_key": new.idempotency_key,
                "digest": digest,
                "request": new.request,
                "echo": new.echo,
                "credential": new.credential,
                "state": JobState.QUEUED,
                "created_at": clock(),
                "deadline_at": clock() + self._limits.job_seconds,
                "available_at": clock(),
                "attempts": 0,
                "step": 0,
                "step_count": 0,
                "webhook": webhook_json(new.webhook),
            }
            row = (await connection.execute(insert(JOBS).values(values).returning(*COLUMNS))).one()
            if new.files:
                files = [
                    {"job_id": row.id, "position": position, "data": data}
                    for position, data in enumerate(new.files)
                ]
                await connection.execute(insert(JOB_FILES), files)
            return job_of(row), True

        # Exclusive, because both the count and the look-up of the key must hold until the job is in.
        return await self._database.write(work, exclusive=True)

    async def get(self, owner: str, job_id: str, *, api: str | None = None) -> Job:
        """Returns a job.

        Args:
            owner: the key that asks.
            job_id: the job's id.
            api: the only API whose jobs count; `None` means all.

        Raises:
            JobNotFound: there is none, it is another key's, or of another API.
            StoreUnavailable: the database failed.
        """

        async def work(connection: AsyncConnection) -> Job:
            row = (await connection.execute(select(*COLUMNS).where(JOBS.c.id == job_id))).first()
            if row is None or row.owner != owner or (api is not None and row.api != api):
                raise JobNotFound(f"there is no job {job_id!r}")
            return job_of(row)

        return await self._database.read(work)

    async def find(self, owner: str, idempotency_key: str) -> Job:
        """Returns the job that a key's request with an idempotency key has made.

        Raises:
            JobNotFound: there is none.
            StoreUnavailable: the database failed.
        """

        async def work(connection: AsyncConnection) -> Job:
            same_key = (JOBS.c.owner == owner) & (JOBS.c.idempotency_key == idempotency_key)
            row = (await connection.execute(select(*COLUMNS).where(same_key))).first()
            if row is None:
                raise JobNotFound(f"there is no job of {idempotency_key!r}")
            return job_of(row)

        return await self._database.read(work)

    async def list(
        self, owner: str, api: str, *, limit: int, before: tuple[float, str] | None = None
    ) -> JobPage:
        """Returns a page of a key's jobs of one API, the latest first.

        Raises:
            StoreUnavailable: the database failed.
        """

        async def work(connection: AsyncConnection) -> JobPage:
            query = select(*COLUMNS).where(JOBS.c.owner == owner, JOBS.c.api == api)
            if before is not None:
                time, job_id = before
                query = query.where(
                    or_(JOBS.c.created_at < time, (JOBS.c.created_at == time) & (JOBS.c.id < job_id))
                )
            query = query.order_by(JOBS.c.created_at.desc(), JOBS.c.id.desc()).limit(limit + 1)
            jobs = [job_of(row) for row in await connection.execute(query)]
            more = len(jobs) > limit
            last = jobs[limit - 1] if more else None
            return JobPage(jobs[:limit], (last.created_at, last.id) if last else None)

        return await self._database.read(work)

    async def cancel(self, owner: str, job_id: str, *, api: str | None = None) -> Job:
        """Cancels a job that has not ended; the gateway that runs it loses its lease. An ended job stays as it is.

        Raises:
            JobNotFound: there is none, it is another key's, or of another API.
            StoreUnavailable: the database failed.
        """

        async def work(connection: AsyncConnection) -> None:
            mine = (JOBS.c.id == job_id) & (JOBS.c.owner == owner)
            if api is not None:
                mine &= JOBS.c.api == api
            await self._end(connection, mine, JobState.CANCELED, None)

        await self._database.write(work)
        return await self.get(owner, job_id, api=api)

    async def count_open(self) -> Mapping[JobState, int]:
        """Returns the numbers of jobs of all keys that wait and that run.

        Raises:
            StoreUnavailable: the database failed.
        """

        async def work(connection: AsyncConnection) -> Mapping[JobState, int]:
            query = select(JOBS.c.state, func.count()).where(JOBS.c.state.in_(OPEN_STATES))
            counts = {state: count for state, count in await connection.execute(query.group_by(JOBS.c.state))}
            return {state: counts.get(state, 0) for state in OPEN_STATES}

        return await self._database.read(work)

    async def expire(self) -> Sequence[Job]:
        """Ends jobs whose time has passed as failed, and returns them.

        Raises:
            StoreUnavailable: the database failed.
        """

        async def work(connection: AsyncConnection) -> Sequence[Job]:
            late = select(JOBS.c.id).where(JOBS.c.state.in_(OPEN_STATES), JOBS.c.deadline_at < clock())
            ids = (await connection.scalars(late.limit(DELETED_AT_ONCE))).all()
            error = JobError(
                code="EXPIRED", message=f"the job did not end within {self._limits.job_seconds:g} seconds"
            )
            return await self._end(connection, JOBS.c.id.in_(ids), JobState.FAILED, error) if ids else []

        return await self._database.write(work)

    async def deletable(self) -> Sequence[Job]:
        """Returns ended jobs that are older than they are kept, some of them.

        Raises:
            StoreUnavailable: the database failed.
        """

        async def work(connection: AsyncConnection) -> Sequence[Job]:
            query = select(*COLUMNS).where(JOBS.c.expires_at < clock()).limit(DELETED_AT_ONCE)
            return [job_of(row) for row in await connection.execute(query)]

        return await self._database.read(work)

    async def delete(self, job_ids: Sequence[str]) -> None:
        """Deletes ended jobs with all that waits for delivery; their images must be deleted before.

        Raises:
            StoreUnavailable: the database failed.
        """

        async def work(connection: AsyncConnection) -> None:
            await connection.execute(delete(DELIVERIES).where(DELIVERIES.c.job_id.in_(job_ids)))
            ended = JOBS.c.id.in_(job_ids) & JOBS.c.state.not_in(OPEN_STATES)
            await connection.execute(delete(JOBS).where(ended))

        await self._database.write(work)

    async def _require_place(self, connection: AsyncConnection, owner: str) -> None:
        open_jobs = select(func.count()).select_from(JOBS).where(JOBS.c.state.in_(OPEN_STATES))
        if (await connection.scalar(open_jobs) or 0) >= self._limits.open_jobs:
            raise QueueFull(self._limits.open_jobs, of_owner=False)
        of_owner = await connection.scalar(open_jobs.where(JOBS.c.owner == owner)) or 0
        if of_owner >= self._limits.open_jobs_of_owner:
            raise QueueFull(self._limits.open_jobs_of_owner, of_owner=True)

    async def _end(
        self, connection: AsyncConnection, which: Any, state: JobState, error: JobError | None
    ) -> Sequence[Job]:
        values = {
            "state": state,
            "completed_at": clock(),
            "expires_at": clock() + self._limits.retention_seconds,
            "lease": None,
            "lease_expires_at": None,
            "credential": None,
            "error": None if error is None else asdict(error),
        }
        change = update(JOBS).where(which, JOBS.c.state.in_(OPEN_STATES)).values(values)
        jobs = [job_of(row) for row in (await connection.execute(change.returning(*COLUMNS))).all()]
        for job in jobs:
            await connection.execute(delete(JOB_FILES).where(JOB_FILES.c.job_id == job.id))
            await post_events(connection, job, [WebhookEvent.COMPLETED], self._webhook_body)
        return jobs


def request_digest(new: NewJob) -> str:
    """Returns a digest of everything that the client asked for; the seed counts only where the client chose it."""
    content = json.dumps([new.api, new.echo, webhook_json(new.webhook)], sort_keys=True).encode()
    digest = hashlib.sha256(content)
    for data in new.files:
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()
