"""Properties of the job store that hold on every database; a subclass has the fixture `database_url`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from sqlalchemy import func, select, update

from klein_services.gateway.job import (
    IdempotencyConflict,
    Job,
    JobError,
    JobNotFound,
    JobState,
    NewJob,
    QueueFull,
    StoreUnavailable,
    Webhook,
    WebhookEvent,
)
from klein_services.gateway.job_database import DELIVERIES, JOB_FILES, JOBS, SCHEMA, JobDatabase
from klein_services.gateway.job_queue import MAXIMUM_ATTEMPTS, JobQueue
from klein_services.gateway.job_store import JobLimits, JobStore

LIMITS = JobLimits(open_jobs=6, open_jobs_of_owner=4, job_seconds=600, retention_seconds=600)


def body(job: Job, event: WebhookEvent) -> str:
    return json.dumps({"id": job.id, "state": job.state, "event": event})


def new_job(owner: str = "ann", **changes: object) -> NewJob:
    values: dict = {
        "owner": owner,
        "api": "bfl",
        "request": {"prompt": "a ring", "seed": 7},
        "echo": {"prompt": "a ring"},
    }
    return NewJob(**(values | changes))


class Gateway:
    """Store and queue as one gateway has them."""

    def __init__(self, url: str, limits: JobLimits = LIMITS, lease_seconds: float = 60.0) -> None:
        self.database = JobDatabase(url)
        self.store = JobStore(self.database, limits, body)
        self.queue = JobQueue(
            self.database,
            lease_seconds=lease_seconds,
            retention_seconds=limits.retention_seconds,
            webhook_body=body,
        )

    async def set(self, job_id: str, **values: object) -> None:
        """Writes columns of a job, as a gateway of another time would have."""
        change = update(JOBS).where(JOBS.c.id == job_id).values(values)
        await self.database.write(lambda connection: connection.execute(change))

    async def count(self, table: object) -> int:
        query = select(func.count()).select_from(table)  # type: ignore[arg-type]
        return await self.database.read(lambda connection: connection.scalar(query))

    async def events(self, job_id: str) -> list[tuple[str, str]]:
        """Events that wait for the job's webhook, with the state in their bodies."""
        query = select(DELIVERIES.c.event, DELIVERIES.c.body).where(DELIVERIES.c.job_id == job_id)

        async def work(connection):
            return [tuple(row) for row in await connection.execute(query.order_by(DELIVERIES.c.position))]

        return [(event, json.loads(text)["state"]) for event, text in await self.database.read(work)]


class JobStoreContract:
    @pytest.fixture
    async def gateways(self, database_url: str) -> AsyncIterator[tuple[Gateway, Gateway]]:
        """Two gateways with one database."""
        async with AsyncExitStack() as stack:
            both = (Gateway(database_url), Gateway(database_url))
            for gateway in both:
                stack.push_async_callback(gateway.database.close)
                await gateway.database.open()
            yield both

    async def test_a_job_goes_through_its_life(self, gateways):
        first, second = gateways
        new = new_job(files=[b"one", b"two"], credential="sealed")
        job, created = await first.store.create(new)
        assert created
        assert job.state is JobState.QUEUED
        assert job.request == {"prompt": "a ring", "seed": 7}
        assert job.deadline_at == pytest.approx(job.created_at + 600, abs=1)

        leased = await second.queue.claim()
        assert leased is not None
        assert not leased.taken_over
        assert (leased.job.id, leased.files, leased.job.credential) == (job.id, [b"one", b"two"], "sealed")
        assert await first.queue.claim() is None
        await second.queue.report_step(leased, 2, 4)
        running = await first.store.get("ann", job.id)
        assert (running.state, running.step, running.step_count) == (JobState.RUNNING, 2, 4)

        assert await second.queue.succeed(leased, {"images": ["key"]})
        ended = await first.store.get("ann", job.id)
        assert ended.state is JobState.SUCCEEDED
        assert ended.result == {"images": ["key"]}
        assert ended.started_at >= job.created_at
        assert ended.completed_at >= ended.started_at
        assert ended.expires_at == pytest.approx(ended.completed_at + 600, abs=1)
        # Neither the images of the client nor its key stay longer than they are needed.
        assert await first.count(JOB_FILES) == 0
        assert ended.credential is None

    async def test_a_failed_job_has_its_error(self, gateways):
        gateway = gateways[0]
        job, _ = await gateway.store.create(new_job())
        leased = await gateway.queue.claim()
        violation = {"field": "seed", "description": "must be positive"}
        error = JobError(code="INVALID_ARGUMENT", message="seed", violations=[violation])
        assert await gateway.queue.fail(leased, error)
        assert (await gateway.store.get("ann", job.id)).error == error

    async def test_a_job_exists_for_its_key_and_api_only(self, gateways):
        gateway = gateways[0]
        job, _ = await gateway.store.create(new_job("ann"))
        for look_up in (
            gateway.store.get("bob", job.id),
            gateway.store.get("ann", job.id, api="predictions"),
            gateway.store.get("ann", "none"),
            gateway.store.cancel("bob", job.id),
            gateway.store.cancel("ann", job.id, api="predictions"),
        ):
            with pytest.raises(JobNotFound):
                await look_up
        assert (await gateway.store.get("ann", job.id, api="bfl")).state is JobState.QUEUED
        assert (await gateway.store.list("bob", "bfl", limit=9)).jobs == []

    async def test_the_same_key_makes_one_job_at_any_number_of_gateways(self, gateways):
        new = new_job(idempotency_key="k")
        made = await asyncio.gather(*(gateway.store.create(new) for gateway in gateways for _ in range(10)))
        assert len({job.id for job, _ in made}) == 1
        assert [created for _, created in made].count(True) == 1
        assert await gateways[0].count(JOBS) == 1
        # A seed that the gateway drew is no part of what the client asked for.
        again = new_job(idempotency_key="k", request={"prompt": "a ring", "seed": 8})
        assert (await gateways[0].store.create(again))[0].request["seed"] == 7
        assert (await gateways[0].store.find("ann", "k")).id == made[0][0].id

    async def test_a_key_of_another_request_or_owner(self, gateways):
        gateway = gateways[0]
        job, _ = await gateway.store.create(new_job(idempotency_key="k"))
        for other in ({"echo": {"prompt": "a disc"}}, {"files": [b"picture"]}, {"api": "predictions"}):
            with pytest.raises(IdempotencyConflict):
                await gateway.store.create(new_job(idempotency_key="k", **other))
        bobs, created = await gateway.store.create(new_job("bob", idempotency_key="k"))
        assert created
        assert bobs.id != job.id
        with pytest.raises(JobNotFound):
            await gateway.store.find("carl", "k")

    async def test_the_queue_is_bounded_by_key_and_in_all(self, gateways):
        limits = set()

        async def offer(owner: str, gateway: Gateway) -> bool:
            try:
                return (await gateway.store.create(new_job(owner)))[1]
            except QueueFull as error:
                limits.add((error.of_owner, error.limit))
                return False

        accepted = await asyncio.gather(*(offer("ann", gateways[index % 2]) for index in range(12)))
        assert accepted.count(True) == 4
        accepted = await asyncio.gather(*(offer("bob", gateways[index % 2]) for index in range(12)))
        assert accepted.count(True) == 2
        assert await gateways[0].store.count_open() == {JobState.QUEUED: 6, JobState.RUNNING: 0}
        leased = await gateways[0].queue.claim()
        assert not await offer("bob", gateways[0])
        await gateways[0].queue.succeed(leased, {})
        assert await offer("bob", gateways[0])
        assert limits == {(True, 4), (False, 6)}

    async def test_every_job_is_claimed_once(self, gateways):
        for index in range(6):
            await gateways[0].store.create(new_job("ann" if index < 4 else "bob"))
        claims = await asyncio.gather(*(gateways[index % 2].queue.claim() for index in range(20)))
        leased = [claim for claim in claims if claim is not None]
        # A gateway that finds its candidate locked by another one goes away empty and asks again.
        while (claim := await gateways[0].queue.claim()) is not None:
            leased.append(claim)
        assert len(leased) == 6
        assert len({each.job.id for each in leased}) == 6

    async def test_keys_with_fewer_running_jobs_go_first(self, gateways):
        gateway = gateways[0]
        for owner in ("ann", "ann", "ann", "bob", "bob"):
            await gateway.store.create(new_job(owner))
        order = [(await gateway.queue.claim()).job.owner for _ in range(5)]
        assert order == ["ann", "bob", "ann", "bob", "ann"]

    async def test_a_dead_gateways_job_is_taken_over_once(self, gateways):
        dead, alive = gateways
        job, _ = await dead.store.create(new_job())
        lost = await dead.queue.claim()
        assert await alive.queue.claim() is None
        await alive.set(job.id, lease_expires_at=job.created_at - 1)
        claims = await asyncio.gather(*(alive.queue.claim() for _ in range(8)))
        [taken] = [claim for claim in claims if claim is not None]
        assert taken.taken_over
        assert taken.job.request == lost.job.request
        assert taken.job.attempts == 2
        # The gateway was not dead but slow: nothing that it does changes the job any more.
        assert await dead.queue.renew([lost.lease]) == frozenset()
        await dead.queue.report_step(lost, 3, 4)
        assert not await dead.queue.succeed(lost, {"images": ["old"]})
        assert not await dead.queue.fail(lost, JobError(code="INTERNAL", message="old"))
        assert not await dead.queue.give_back(lost)
        assert (await alive.store.get("ann", job.id)).step == 0
        assert await alive.queue.succeed(taken, {"images": ["new"]})
        assert (await alive.store.get("ann", job.id)).result == {"images": ["new"]}

    async def test_a_renewed_lease_holds(self, gateways):
        gateway = gateways[0]
        job, _ = await gateway.store.create(new_job())
        leased = await gateway.queue.claim()
        await gateway.set(job.id, lease_expires_at=job.created_at - 1)
        assert await gateway.queue.renew([leased.lease, "other"]) == {leased.lease}
        assert await gateways[1].queue.claim() is None

    async def test_a_clock_that_was_set_back_does_not_keep_a_job(self, gateways):
        gateway = gateways[0]
        job, _ = await gateway.store.create(new_job())
        assert await gateway.queue.claim() is not None
        await gateway.set(job.id, lease_expires_at=job.created_at + 86400)
        assert (await gateways[1].queue.claim()).job.id == job.id

    async def test_a_job_that_is_given_back_keeps_its_place(self, gateways):
        gateway = gateways[0]
        first, _ = await gateway.store.create(new_job())
        await gateway.store.create(new_job())
        leased = await gateway.queue.claim()
        assert await gateway.queue.give_back(leased)
        again = await gateways[1].queue.claim()
        assert (again.job.id, again.job.attempts, again.taken_over) == (first.id, 1, False)
        assert await gateways[1].queue.give_back(again, delay_seconds=300)
        assert (await gateway.queue.claim()).job.id != first.id

    async def test_a_job_that_stops_every_gateway_fails(self, gateways):
        gateway = gateways[0]
        job, _ = await gateway.store.create(new_job(webhook=Webhook(url="http://hook")))
        for _ in range(MAXIMUM_ATTEMPTS):
            assert (await gateway.queue.claim()).job.id == job.id
            await gateway.set(job.id, lease_expires_at=0)
        assert await gateway.queue.claim() is None
        ended = await gateway.store.get("ann", job.id)
        assert (ended.state, ended.error.code) == (JobState.FAILED, "ABANDONED")
        assert await gateway.events(job.id) == [("completed", "failed")]

    async def test_cancel_and_completion_at_once_have_one_winner(self, gateways):
        for _ in range(5):
            job, _ = await gateways[0].store.create(new_job(webhook=Webhook(url="http://hook")))
            leased = await gateways[1].queue.claim()
            canceled, succeeded = await asyncio.gather(
                gateways[0].store.cancel("ann", job.id), gateways[1].queue.succeed(leased, {"images": []})
            )
            expected = JobState.SUCCEEDED if succeeded else JobState.CANCELED
            assert canceled.state is expected
            assert (await gateways[1].store.get("ann", job.id)).state is expected
            assert await gateways[0].events(job.id) == [("completed", expected)]

    async def test_a_canceled_job_stays_canceled(self, gateways):
        gateway = gateways[0]
        job, _ = await gateway.store.create(new_job(files=[b"one"]))
        assert (await gateway.store.cancel("ann", job.id)).state is JobState.CANCELED
        first = (await gateway.store.cancel("ann", job.id)).completed_at
        assert (await gateway.store.cancel("ann", job.id)).completed_at == first
        assert await gateway.queue.claim() is None
        assert await gateway.count(JOB_FILES) == 0

    async def test_late_jobs_fail(self, gateways):
        gateway = gateways[0]
        waiting, _ = await gateway.store.create(new_job())
        running, _ = await gateway.store.create(new_job())
        on_time, _ = await gateway.store.create(new_job())
        for job in (waiting, running):
            await gateway.set(job.id, deadline_at=job.created_at - 1)
        assert {job.id for job in await gateway.store.expire()} == {waiting.id, running.id}
        assert await gateway.store.expire() == []
        for job in (waiting, running):
            ended = await gateway.store.get("ann", job.id)
            assert (ended.state, ended.error.code) == (JobState.FAILED, "EXPIRED")
        assert (await gateway.store.get("ann", on_time.id)).state is JobState.QUEUED

    async def test_old_jobs_are_deleted(self, gateways):
        gateway = gateways[0]
        new = new_job(idempotency_key="k", webhook=Webhook(url="http://hook"))
        old, _ = await gateway.store.create(new)
        kept, _ = await gateway.store.create(new_job())
        await gateway.store.cancel("ann", old.id)
        assert await gateway.store.deletable() == []
        await gateway.set(old.id, expires_at=old.created_at - 1)
        assert [job.id for job in await gateway.store.deletable()] == [old.id]
        await gateway.store.delete([old.id, kept.id])
        with pytest.raises(JobNotFound):
            await gateway.store.get("ann", old.id)
        # Only ended jobs are deleted, whatever is asked for.
        assert (await gateway.store.get("ann", kept.id)).state is JobState.QUEUED
        assert await gateway.count(DELIVERIES) == 0
        assert (await gateway.store.create(new))[1]

    async def test_events_of_a_webhook(self, gateways):
        gateway = gateways[0]
        hook = Webhook(url="http://hook", secret="s", events=frozenset(WebhookEvent))
        job, _ = await gateway.store.create(new_job(webhook=hook))
        assert job.webhook == hook
        leased = await gateway.queue.claim()
        await gateway.queue.report_step(leased, 1, 4)
        await gateway.queue.give_back(leased)
        leased = await gateway.queue.claim()
        await gateway.queue.report_step(leased, 2, 4)
        assert [event for event, _ in await gateway.events(job.id)] == ["start", "logs"]
        await gateway.queue.succeed(leased, {"images": []})
        assert await gateway.events(job.id) == [
            ("start", "running"),
            ("logs", "running"),
            ("output", "running"),
            ("completed", "succeeded"),
        ]

    async def test_pages_of_a_list(self, gateways):
        gateway = gateways[0]
        jobs = [(await gateway.store.create(new_job()))[0].id for _ in range(4)]
        for job_id in jobs:
            await gateway.set(job_id, created_at=1000.0)  # The id decides between equal times.
        seen, before = [], None
        while True:
            page = await gateway.store.list("ann", "bfl", limit=3, before=before)
            seen += [job.id for job in page.jobs]
            before = page.next
            if before is None:
                break
        assert seen == sorted(jobs, reverse=True)

    async def test_a_cancelled_call_leaves_no_transaction_behind(self, gateways):
        for _ in range(10):
            task = asyncio.create_task(gateways[0].store.create(new_job("bob")))
            await asyncio.sleep(0.002)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert (await gateways[1].store.create(new_job("ann")))[1]

    async def test_tables_of_another_version_are_refused(self, gateways, database_url):
        await gateways[0].database.write(
            lambda connection: connection.execute(update(SCHEMA).values(version=2))
        )
        newer = JobDatabase(database_url)
        try:
            with pytest.raises(
                StoreUnavailable, match="has tables of version 2; this gateway needs version 1"
            ):
                await newer.open()
        finally:
            await newer.close()
