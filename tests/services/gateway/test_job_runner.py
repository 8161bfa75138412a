"""Runner of jobs: bounds, leases, faults of the database, and the stop."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from klein_services.gateway.job import Job, JobError, JobState, LeasedJob
from klein_services.gateway.job_database import JobDatabase
from klein_services.gateway.job_runner import JobFailed, JobPostponed, JobRunner, ReportStep
from tests.services.fakes.runtime_toy import until
from tests.services.gateway.job_contract import Gateway, new_job


class Images:
    """Work of the runner, held up until the test lets it go."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.cancelled: list[str] = []
        self.gate = asyncio.Event()
        self.error: Exception | None = None
        self.at_once = 0
        self.most_at_once = 0

    async def make(self, leased: LeasedJob, report: ReportStep) -> Mapping[str, Any]:
        self.begun.append(leased.job.id)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        report(1, 4)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.append(leased.job.id)
            raise
        finally:
            self.at_once -= 1
        if self.error is not None:
            raise self.error
        return {"images": [leased.job.request["seed"]]}


@pytest.fixture
def images() -> Images:
    return Images()


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    gateway = Gateway(f"sqlite:///{tmp_path}/jobs.sqlite", lease_seconds=1.0)
    await gateway.database.open()
    yield gateway
    await gateway.database.close()


@pytest.fixture
async def runner(gateway: Gateway, images: Images) -> AsyncIterator[JobRunner]:
    runner = JobRunner(gateway.queue, images.make, concurrency=2, lease_seconds=1.0)
    runner.start()
    yield runner
    await runner.close()


async def state(gateway: Gateway, job_id: str) -> JobState:
    return (await gateway.store.get("ann", job_id)).state


async def ended(gateway: Gateway, job_id: str) -> JobState:
    return (await becomes(gateway, job_id, lambda job: job.state.final)).state


async def becomes(gateway: Gateway, job_id: str, is_wanted: Callable[[Job], bool]) -> Job:
    async with asyncio.timeout(60):
        while True:
            job = await gateway.store.get("ann", job_id)
            if is_wanted(job):
                return job
            await asyncio.sleep(0.02)


async def test_as_many_jobs_at_a_time_as_allowed(gateway, runner, images):
    jobs = [(await gateway.store.create(new_job()))[0].id for _ in range(4)]
    runner.wake()
    await until(lambda: len(images.begun) == 2)
    await asyncio.sleep(0.1)
    assert len(images.begun) == 2
    images.gate.set()
    for job_id in jobs:
        assert await ended(gateway, job_id) is JobState.SUCCEEDED
    assert images.most_at_once == 2
    assert sorted(images.begun) == sorted(jobs)
    assert (await gateway.store.get("ann", jobs[0])).result == {"images": [7]}


async def test_progress_is_written_and_leases_hold(gateway, runner, images):
    job, _ = await gateway.store.create(new_job())
    runner.wake()
    await becomes(gateway, job.id, lambda job: job.step_count == 4)
    # Longer than the lease: without renewals another gateway would take the job.
    other = Gateway(str(gateway.database._url), lease_seconds=1.0)
    await asyncio.sleep(1.5)
    assert await other.queue.claim() is None
    await other.database.close()
    images.gate.set()
    assert await ended(gateway, job.id) is JobState.SUCCEEDED
    assert images.begun == [job.id]


async def test_a_canceled_job_stops(gateway, runner, images):
    job, _ = await gateway.store.create(new_job())
    runner.wake()
    await until(lambda: images.begun)
    # By another gateway: this one notices with the next renewal.
    await gateway.store.cancel("ann", job.id)
    await until(lambda: images.cancelled == [job.id])
    assert await state(gateway, job.id) is JobState.CANCELED
    # By this gateway: at once.
    job, _ = await gateway.store.create(new_job())
    runner.wake()
    await until(lambda: len(images.begun) == 2)
    await gateway.store.cancel("ann", job.id)
    runner.abandon(job.id)
    await until(lambda: len(images.cancelled) == 2)
    runner.abandon("none")
    assert await state(gateway, job.id) is JobState.CANCELED


async def test_jobs_return_to_the_queue_at_the_stop(gateway, images):
    runner = JobRunner(gateway.queue, images.make, concurrency=2, lease_seconds=60)
    runner.start()
    running = [(await gateway.store.create(new_job()))[0].id for _ in range(3)]
    runner.wake()
    await until(lambda: len(images.begun) == 2)
    await runner.close()
    assert sorted(images.cancelled) == sorted(images.begun)
    assert {await state(gateway, job_id) for job_id in running} == {JobState.QUEUED}
    # At once, not after the lease, and without an attempt that is counted.
    leased = await gateway.queue.claim()
    assert (leased.job.id, leased.job.attempts, leased.taken_over) == (running[0], 1, False)


async def test_a_draining_runner_finishes_what_it_has(gateway, images):
    runner = JobRunner(gateway.queue, images.make, concurrency=1, lease_seconds=60)
    runner.start()
    first, _ = await gateway.store.create(new_job())
    second, _ = await gateway.store.create(new_job())
    runner.wake()
    await until(lambda: images.begun)
    runner.drain()
    images.gate.set()
    assert await ended(gateway, first.id) is JobState.SUCCEEDED
    await runner.close()
    assert await state(gateway, second.id) is JobState.QUEUED


async def test_ends_of_jobs(gateway, runner, images):
    images.gate.set()
    images.error = JobFailed(JobError(code="NOT_FOUND", message="no such model"))
    job, _ = await gateway.store.create(new_job())
    runner.wake()
    assert await ended(gateway, job.id) is JobState.FAILED
    assert (await gateway.store.get("ann", job.id)).error.code == "NOT_FOUND"

    images.error = ValueError("a secret")
    job, _ = await gateway.store.create(new_job())
    runner.wake()
    assert await ended(gateway, job.id) is JobState.FAILED
    error = (await gateway.store.get("ann", job.id)).error
    assert error.code == "INTERNAL"
    assert job.id in error.message
    assert "secret" not in error.message

    images.error = JobPostponed("full", 300)
    job, _ = await gateway.store.create(new_job())
    runner.wake()
    await until(lambda: len(images.begun) == 3)
    await becomes(gateway, job.id, lambda job: job.state is JobState.QUEUED)
    await asyncio.sleep(0.05)
    assert len(images.begun) == 3


async def test_a_locked_database_loses_no_result(tmp_path, images):
    url = f"sqlite:///{tmp_path}/jobs.sqlite"
    gateway = Gateway(url)
    await gateway.database.close()
    database = JobDatabase(url, busy_seconds=0.1)
    gateway.database = gateway.store._database = gateway.queue._database = database
    await database.open()
    runner = JobRunner(gateway.queue, images.make, concurrency=1, lease_seconds=60)
    job, _ = await gateway.store.create(new_job())
    runner.start()
    await until(lambda: images.begun)
    other = sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    images.gate.set()
    await asyncio.sleep(0.5)
    assert await state(gateway, job.id) is JobState.RUNNING
    other.execute("COMMIT")
    other.close()
    assert await ended(gateway, job.id) is JobState.SUCCEEDED
    assert images.begun == [job.id]
    await runner.close()
    await database.close()
