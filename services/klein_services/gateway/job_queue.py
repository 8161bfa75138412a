"""Queue of the jobs: gateways take jobs from it under leases, and give back, end or lose them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import and_, delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from klein_services.gateway.job import JobError, JobState, LeasedJob, WebhookEvent
from klein_services.gateway.job_database import JOB_FILES, JOBS, JobDatabase, clock
from klein_services.gateway.job_rows import COLUMNS, WebhookBody, job_of, new_id, post_events

LONGEST_LEASE_SECONDS = 3600.0
"""Longest lease of any gateway. One that ends later was written before the clock was set back, and is over."""
MAXIMUM_ATTEMPTS = 5
"""Runs of a job that may end with the death of their gateway before the job fails: it may be their cause."""


class JobQueue:
    """Open jobs of the database.

    Args:
        database: an open database.
        lease_seconds: time after which a job of a gateway that has stopped is taken over.
        retention_seconds: time for which an ended job is kept.
        webhook_body: body of the calls of webhooks.
    """

    def __init__(
        self,
        database: JobDatabase,
        *,
        lease_seconds: float,
        retention_seconds: float,
        webhook_body: WebhookBody,
    ) -> None:
        self._database = database
        self._lease_seconds = lease_seconds
        self._retention_seconds = retention_seconds
        self._webhook_body = webhook_body

    async def claim(self) -> LeasedJob | None:
        """Takes the next job: that of the key with the fewest running ones, and of those the oldest.

        Raises:
            StoreUnavailable: the database failed.
        """

        async def work(connection: AsyncConnection) -> LeasedJob | None:
            running = (
                select(JOBS.c.owner, func.count().label("jobs"))
                .where(JOBS.c.state == JobState.RUNNING)
                .group_by(JOBS.c.owner)
                .subquery()
            )
            candidate = (
                select(JOBS.c.id, JOBS.c.state, JOBS.c.started_at)
                .select_from(JOBS.outerjoin(running, running.c.owner == JOBS.c.owner))
                .where(_claimable())
                .order_by(func.coalesce(running.c.jobs, 0), JOBS.c.created_at, JOBS.c.id)
                .limit(1)
                .with_for_update(of=JOBS, skip_locked=True)
            )
            found = (await connection.execute(candidate)).first()
            if found is None:
                return None
            lease = new_id()
            values = {
                "state": JobState.RUNNING,
                "lease": lease,
                "lease_expires_at": clock() + self._lease_seconds,
                "attempts": JOBS.c.attempts + 1,
                "started_at": clock(),
                "step": 0,
            }
            change = update(JOBS).where(JOBS.c.id == found.id).values(values).returning(*COLUMNS)
            job = job_of((await connection.execute(change)).one())
            if job.attempts > MAXIMUM_ATTEMPTS:
                message = f"the job was begun {MAXIMUM_ATTEMPTS} times and its gateway stopped each time"
                await self._end(connection, job.id, lease, None, JobError(code="ABANDONED", message=message))
                # The next call returns the next job; there may be thousands like this one.
                return None
            query = select(JOB_FILES.c.data).where(JOB_FILES.c.job_id == job.id)
            files = (await connection.scalars(query.order_by(JOB_FILES.c.position))).all()
            if found.started_at is None:
                await post_events(connection, job, [WebhookEvent.START], self._webhook_body)
            return LeasedJob(job=job, lease=lease, files=files, taken_over=found.state == JobState.RUNNING)

        return await self._database.write(work)

    async def renew(self, leases: Collection[str]) -> Collection[str]:
        """Renews leases and returns those that still hold; a lost one's job was canceled, taken over or has expired.

        Raises:
            StoreUnavailable: the database failed.
        """

        async def work(connection: AsyncConnection) -> Collection[str]:
            change = update(JOBS).where(JOBS.c.lease.in_(leases))
            change = change.values(lease_expires_at=clock() + self._lease_seconds)
            return frozenset((await connection.scalars(change.returning(JOBS.c.lease))).all())

        return await self._database.write(work) if leases else frozenset()

    async def report_step(self, leased: LeasedJob, step: int, step_count: int) -> None:
        """Writes the progress of a job; one whose lease is lost stays as it is.

        Raises:
            StoreUnavailable: the database failed.
        """

        async def work(connection: AsyncConnection) -> None:
            change = update(JOBS).where(_held(leased)).values(step=step, step_count=step_count)
            row = (await connection.execute(change.returning(*COLUMNS))).first()
            if row is not None:
                await post_events(connection, job_of(row), [WebhookEvent.LOGS], self._webhook_body)

        await self._database.write(work)

    async def succeed(self, leased: LeasedJob, result: Mapping[str, Any]) -> bool:
        """Ends a job with its result; returns whether the lease held, else nothing is changed.

        Raises:
            StoreUnavailable: the database failed.
        """
        return await self._database.write(
            lambda connection: self._end(connection, leased.job.id, leased.lease, result, None)
        )

    async def fail(self, leased: LeasedJob, error: JobError) -> bool:
        """Ends a job with an error; returns whether the lease held, else nothing is changed.

        Raises:
            StoreUnavailable: the database failed.
        """
        return await self._database.write(
            lambda connection: self._end(connection, leased.job.id, leased.lease, None, error)
        )

    async def give_back(self, leased: LeasedJob, delay_seconds: float = 0.0) -> bool:
        """Puts a job back into the queue, where it keeps its place; returns whether the lease held.

        Raises:
            StoreUnavailable: the database failed.
        """

        async def work(connection: AsyncConnection) -> bool:
            values = {
                "state": JobState.QUEUED,
                "lease": None,
                "lease_expires_at": None,
                "available_at": clock() + delay_seconds,
                # A run that was given back on purpose did not stop its gateway.
                "attempts": JOBS.c.attempts - 1,
            }
            change = update(JOBS).where(_held(leased)).values(values).returning(JOBS.c.id)
            return (await connection.execute(change)).first() is not None

        return await self._database.write(work)

    async def give_back_all(self) -> int:
        """Ends all leases at once; returns their number. Only for a gateway that is alone with its database.

        Raises:
            StoreUnavailable: the database failed.
        """

        async def work(connection: AsyncConnection) -> int:
            running = JOBS.c.state == JobState.RUNNING
            change = update(JOBS).where(running).values(lease_expires_at=0.0).returning(JOBS.c.id)
            return len((await connection.execute(change)).all())

        return await self._database.write(work)

    async def _end(
        self,
        connection: AsyncConnection,
        job_id: str,
        lease: str,
        result: Mapping[str, Any] | None,
        error: JobError | None,
    ) -> bool:
        values: dict[str, Any] = {
            "state": JobState.FAILED if error else JobState.SUCCEEDED,
            "completed_at": clock(),
            "expires_at": clock() + self._retention_seconds,
            "lease": None,
            "lease_expires_at": None,
            "credential": None,
            "result": result,
            "error": asdict(error) if error else None,
        }
        change = update(JOBS).where(JOBS.c.id == job_id, JOBS.c.lease == lease).values(values)
        row = (await connection.execute(change.returning(*COLUMNS))).first()
        if row is None:
            return False
        await connection.execute(delete(JOB_FILES).where(JOB_FILES.c.job_id == job_id))
        job = job_of(row)
        if result is not None:
            processing = replace(job, state=JobState.RUNNING, completed_at=None)
            await post_events(connection, processing, [WebhookEvent.OUTPUT], self._webhook_body)
        await post_events(connection, job, [WebhookEvent.COMPLETED], self._webhook_body)
        return True


def _held(leased: LeasedJob) -> Any:
    return and_(JOBS.c.id == leased.job.id, JOBS.c.lease == leased.lease)


def _claimable() -> Any:
    now = clock()
    waits = and_(JOBS.c.state == JobState.QUEUED, JOBS.c.available_at <= now)
    over = or_(JOBS.c.lease_expires_at < now, JOBS.c.lease_expires_at > now + LONGEST_LEASE_SECONDS)
    return or_(waits, and_(JOBS.c.state == JobState.RUNNING, over))
