"""Runner of jobs: takes them from the queue, keeps their leases, writes their progress and gives back what is left."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from klein_services.gateway.job import Job, JobError, LeasedJob, StoreUnavailable
from klein_services.gateway.job_metrics import (
    JOB_RECOVERIES,
    JOB_SECONDS,
    JOB_WAIT_SECONDS,
    JOBS_ENDED,
    JOBS_RUNNING,
)
from klein_services.gateway.job_queue import JobQueue

PULSE_SECONDS = 1.0
"""Time between two writes of progress, and between two looks at the queue for jobs of other gateways."""
RENEWALS = 3
"""Renewals of a lease before it would be over."""
STORE_PAUSE_SECONDS = 1.0
"""Time between two attempts while the database does not answer."""
_log = logging.getLogger("klein.jobs")
_Value = TypeVar("_Value")

ReportStep = Callable[[int, int], None]
"""Receives the number of a finished step and of all."""
Work = Callable[[LeasedJob, ReportStep], Awaitable[Mapping[str, Any]]]
"""Makes the images of a job and returns its result; raises JobFailed or JobPostponed."""


class JobFailed(Exception):
    """A job cannot succeed.

    Args:
        error: the reason.
    """

    def __init__(self, error: JobError) -> None:
        super().__init__(error.message)
        self.error = error


class JobPostponed(Exception):
    """A job could not run now and goes back into the queue.

    Args:
        reason: for the log.
        delay_seconds: time before which no gateway takes it.
    """

    def __init__(self, reason: str, delay_seconds: float) -> None:
        super().__init__(reason)
        self.delay_seconds = delay_seconds


@dataclass(eq=False)
class _Running:
    leased: LeasedJob
    task: asyncio.Task[None] | None = None
    step: tuple[int, int] = (0, 0)
    written_step: tuple[int, int] = (0, 0)
    is_lost: bool = False
    """Whether the lease is over, so that nothing may be written."""

    def lose(self) -> None:
        """Stops the run without writing its end."""
        self.is_lost = True
        self.stop()

    def stop(self) -> None:
        """Stops the run."""
        if self.task is not None:
            self.task.cancel()


class JobRunner:
    """Runs jobs, a limited number at a time.

    Args:
        queue: the queue of the database.
        work: makes the images of a job.
        concurrency: most jobs at a time.
        lease_seconds: duration of a lease, as in the queue.
        on_end: called in the event loop with the id of a job that has ended or was given back.
        on_success: called in the event loop with a job and its result, once that is written.
    """

    def __init__(
        self,
        queue: JobQueue,
        work: Work,
        *,
        concurrency: int,
        lease_seconds: float,
        on_end: Callable[[str], None] = lambda job_id: None,
        on_success: Callable[[Job, Mapping[str, Any]], None] = lambda job, result: None,
    ) -> None:
        self._queue = queue
        self._work = work
        self._concurrency = concurrency
        self._lease_seconds = lease_seconds
        self._on_end = on_end
        self._on_success = on_success
        self._running: dict[str, _Running] = {}
        """By lease: after a failure of the database a job may be taken while its last run here still ends."""
        self._wake = asyncio.Event()
        self._stopping = False
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begins to take jobs."""
        for loop in (self._claim_jobs(), self._keep_leases()):
            self._loops.append(asyncio.create_task(loop, name="jobs"))

    def wake(self) -> None:
        """Makes the runner look at the queue at once."""
        self._wake.set()

    def drain(self) -> None:
        """Takes no more jobs; those that run go on."""
        self._stopping = True
        self._wake.set()

    def abandon(self, job_id: str) -> None:
        """Stops a job that was canceled, if it runs here, before its lease would show it."""
        for running in self._running.values():
            if running.leased.job.id == job_id:
                running.lose()

    async def close(self) -> None:
        """Stops; jobs that run go back into the queue."""
        self.drain()
        claiming, *others = self._loops
        # Not cancelled: a job that was just taken must be given back.
        await claiming
        running_jobs = list(self._running.values())
        for running in running_jobs:
            running.stop()
        await asyncio.gather(*filter(None, (each.task for each in running_jobs)), return_exceptions=True)
        for loop in others:
            loop.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _claim_jobs(self) -> None:
        while not self._stopping:
            self._wake.clear()
            leased = None
            pause = PULSE_SECONDS
            if len(self._running) < self._concurrency:
                try:
                    leased = await self._queue.claim()
                except StoreUnavailable as error:
                    _log.error("no job can be taken: %s", error)
                    pause = STORE_PAUSE_SECONDS
                except Exception:
                    _log.exception("no job can be taken because of a fault")
            if leased is not None:
                self._begin(leased)
                continue
            try:
                await asyncio.wait_for(self._wake.wait(), pause)
            except TimeoutError:
                continue

    def _begin(self, leased: LeasedJob) -> None:
        job = leased.job
        if leased.taken_over:
            JOB_RECOVERIES.inc()
            _log.warning("a job is run again, because its gateway stopped", extra={"job": job.id})
        else:
            JOB_WAIT_SECONDS.labels(job.api).observe(max(0.0, (job.started_at or 0.0) - job.created_at))
        running = self._running[leased.lease] = _Running(leased)
        JOBS_RUNNING.set(len(self._running))
        running.task = asyncio.create_task(self._run(running), name=f"job {job.id}")
        running.task.add_done_callback(lambda task: self._ended(leased))

    def _ended(self, leased: LeasedJob) -> None:
        del self._running[leased.lease]
        JOBS_RUNNING.set(len(self._running))
        self._wake.set()
        self._on_end(leased.job.id)

    async def _run(self, running: _Running) -> None:
        leased, begin = running.leased, time.monotonic()
        job = leased.job

        def report(step: int, step_count: int) -> None:
            running.step = (step, step_count)

        try:
            result = await self._work(leased, report)
            if await self._written(leased, lambda: self._queue.succeed(leased, result)):
                self._count(leased, "succeeded", begin)
                self._on_success(job, result)
        except JobFailed as failure:
            await self._fail(leased, failure.error, begin)
        except JobPostponed as postponed:
            _log.info("a job waits: %s", postponed, extra={"job": job.id})
            delay = postponed.delay_seconds
            await self._written(leased, lambda: self._queue.give_back(leased, delay))
        except asyncio.CancelledError:
            if not running.is_lost:
                await self._written(leased, lambda: self._queue.give_back(leased))
            raise
        except Exception:
            _log.exception("a job failed because of a fault", extra={"job": job.id})
            error = JobError(
                code="INTERNAL", message=f"The gateway failed. Its log has the cause under {job.id}."
            )
            await self._fail(leased, error, begin)

    async def _fail(self, leased: LeasedJob, error: JobError, begin: float) -> None:
        if await self._written(leased, lambda: self._queue.fail(leased, error)):
            self._count(leased, "failed", begin)

    def _count(self, leased: LeasedJob, outcome: str, begin: float) -> None:
        JOBS_ENDED.labels(leased.job.api, outcome).inc()
        JOB_SECONDS.labels(leased.job.api).observe(time.monotonic() - begin)

    async def _written(self, leased: LeasedJob, write: Callable[[], Awaitable[bool]]) -> bool:
        """Writes the end of a run; while the database does not answer, again and again until the lease is over."""
        give_up_at = time.monotonic() + self._lease_seconds
        while True:
            try:
                return await write()
            except StoreUnavailable as error:
                _log.error("the end of a job cannot be written: %s", error, extra={"job": leased.job.id})
                if self._stopping or time.monotonic() > give_up_at:
                    # Its lease ends; the next gateway makes the same images.
                    return False
                await asyncio.sleep(STORE_PAUSE_SECONDS)

    async def _keep_leases(self) -> None:
        renewed_at = time.monotonic()
        while True:
            await asyncio.sleep(min(PULSE_SECONDS, self._lease_seconds / RENEWALS))
            try:
                await self._write_steps()
                if time.monotonic() - renewed_at >= self._lease_seconds / RENEWALS:
                    await self._renew()
                    renewed_at = time.monotonic()
            except StoreUnavailable as error:
                _log.error("progress and leases of jobs cannot be written: %s", error)
            except Exception:
                _log.exception("progress and leases of jobs cannot be written because of a fault")

    async def _write_steps(self) -> None:
        for running in list(self._running.values()):
            if running.step != running.written_step and not running.is_lost:
                running.written_step = running.step
                await self._queue.report_step(running.leased, *running.step)

    async def _renew(self) -> None:
        before = list(self._running.values())
        held = await self._queue.renew([running.leased.lease for running in before])
        for running in before:
            if running.leased.lease in self._running and running.leased.lease not in held:
                _log.info("a job is stopped: its lease is over", extra={"job": running.leased.job.id})
                running.lose()
