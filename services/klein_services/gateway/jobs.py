"""Jobs of the gateway: the store, the runner and the webhooks together, as the APIs use them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from http import HTTPStatus
from typing import Any

from klein_client import AsyncClient
from klein_services.gateway.errors import ApiError
from klein_services.gateway.job import (
    IdempotencyConflict,
    Job,
    JobNotFound,
    JobState,
    JobStoreError,
    NewJob,
    QueueFull,
    StoreUnavailable,
)
from klein_services.gateway.job_database import JobDatabase
from klein_services.gateway.job_forms import JobForms
from klein_services.gateway.job_images import JobImages
from klein_services.gateway.job_metrics import (
    JOBS_CREATED,
    JOBS_ENDED,
    JOBS_OPEN,
    WEBHOOKS_WAITING,
    initialize_jobs,
)
from klein_services.gateway.job_queue import JobQueue
from klein_services.gateway.job_runner import JobRunner
from klein_services.gateway.job_secret import JobSecret, SecretError, read_secret
from klein_services.gateway.job_settings import JobSettings
from klein_services.gateway.job_store import JobLimits, JobPage, JobStore
from klein_services.gateway.model_directory import ModelDirectory
from klein_services.gateway.outbound import Outbound
from klein_services.gateway.result_store import ResultStore
from klein_services.gateway.uploads import Uploads, UploadsFull
from klein_services.gateway.usage import JobWork, Usage
from klein_services.gateway.webhook_outbox import WebhookOutbox
from klein_services.gateway.webhook_sender import Post, WebhookSender, webhook_post
from klein_services.runtime.settings import SettingsError

LOOK_SECONDS = 0.5
"""Time between two looks at a job that a client waits for and another gateway may run."""
CLEAN_SECONDS = 10.0
"""Time between two clean-ups of the database."""
BUSY_SECONDS = 5.0
"""Time after which a client that was refused because of too many jobs may come back."""
MAXIMUM_SEED = 2**32 - 1
"""Largest seed that is drawn; larger ones lose digits in clients that read JSON's numbers as floating point."""
_log = logging.getLogger("klein.jobs")


class Jobs:
    """Jobs of one gateway. Every method reports a refusal or a failed database as `ApiError`."""

    def __init__(
        self,
        *,
        settings: JobSettings,
        database: JobDatabase,
        secret: JobSecret,
        images: JobImages,
        forms: JobForms,
        post: Post,
        models: ModelDirectory,
        usage: Usage,
    ) -> None:
        limits = JobLimits(
            open_jobs=settings.jobs_limit,
            open_jobs_of_owner=settings.jobs_limit_of_key,
            job_seconds=settings.job_timeout_seconds,
            retention_seconds=settings.job_retention_seconds,
        )
        self.forms = forms
        self.models = models
        self.secret = secret
        self._images = images
        self._usage = usage
        self._database = database
        self._uploads = Uploads(
            database,
            limit_bytes=settings.uploads_limit_mib << 20,
            retention_seconds=settings.job_retention_seconds,
        )
        self._store = JobStore(database, limits, forms.webhook_body)
        self._queue = JobQueue(
            database,
            lease_seconds=settings.job_lease_seconds,
            retention_seconds=settings.job_retention_seconds,
            webhook_body=forms.webhook_body,
        )
        self._runner = JobRunner(
            self._queue,
            images.make,
            concurrency=settings.jobs_running,
            lease_seconds=settings.job_lease_seconds,
            on_end=self._on_end,
            on_success=self._count,
        )
        self._outbox = WebhookOutbox(database, attempts=settings.webhook_attempts)
        self._sender = WebhookSender(self._outbox, post)
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._cleaning: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Makes the tables, and begins to run jobs and to call webhooks.

        Raises:
            StoreUnavailable: the database cannot be used.
        """
        if await self._database.open() and (count := await self._queue.give_back_all()):
            _log.info("jobs of the process before are run again", extra={"jobs": count})
        initialize_jobs()
        self._runner.start()
        self._sender.start()
        self._cleaning = asyncio.create_task(self._clean(), name="jobs")

    def drain(self) -> None:
        """Takes no more jobs from the queue."""
        self._runner.drain()

    async def close(self) -> None:
        """Gives jobs back to the queue and stops."""
        if self._cleaning is not None:
            self._cleaning.cancel()
            await asyncio.gather(self._cleaning, return_exceptions=True)
            await self._runner.close()
            await self._sender.close()
        await self._database.close()

    @contextmanager
    def uploads(self) -> Iterator[Uploads]:
        """Yields the uploaded files; their errors become those of the API."""
        with _reported():
            yield self._uploads

    async def submit(self, new: NewJob) -> tuple[Job, bool]:
        """Makes a job; returns it and whether it is new, not that of the same request before."""
        with _reported():
            job, is_new = await self._store.create(new)
        if is_new:
            JOBS_CREATED.labels(new.api).inc()
            self._runner.wake()
        return job, is_new

    async def get(self, owner: str, job_id: str, api: str) -> Job:
        """Returns a job of a key and an API."""
        with _reported():
            return await self._store.get(owner, job_id, api=api)

    async def find(self, owner: str, idempotency_key: str) -> Job:
        """Returns the job of a key's request with an idempotency key."""
        with _reported():
            return await self._store.find(owner, idempotency_key)

    async def list(self, owner: str, api: str, *, limit: int, before: tuple[float, str] | None) -> JobPage:
        """Returns a page of a key's jobs, the latest first."""
        with _reported():
            return await self._store.list(owner, api, limit=limit, before=before)

    async def cancel(self, job: Job) -> Job:
        """Cancels a job that has not ended, and returns it as it is then."""
        with _reported():
            ended = await self._store.cancel(job.owner, job.id)
        if ended.state is JobState.CANCELED and not job.state.final:
            JOBS_ENDED.labels(job.api, "canceled").inc()
            self._runner.abandon(job.id)
            self._sender.wake()
            self._on_end(job.id)
        return ended

    async def wait(self, job: Job, seconds: float) -> Job:
        """Returns a job when it has ended, or after a time as it is then."""
        deadline = time.monotonic() + seconds
        async with aclosing(self.watch(job, deadline)) as states:
            async for current in states:
                job = current
                if time.monotonic() >= deadline:
                    break
        return job

    async def watch(self, job: Job, deadline: float = math.inf) -> AsyncGenerator[Job]:
        """Yields a job as it is now and again after every look, until it has ended.

        Args:
            job: the job.
            deadline: moment of the last look, in the time of `time.monotonic`.
        """
        ended = asyncio.Event()
        self._waiting.setdefault(job.id, set()).add(ended)
        try:
            while True:
                yield job
                if job.state.final:
                    return
                ended.clear()
                with contextlib.suppress(TimeoutError):
                    remaining = max(0.0, deadline - time.monotonic())
                    await asyncio.wait_for(ended.wait(), min(LOOK_SECONDS, remaining))
                job = await self.get(job.owner, job.id, job.api)
        finally:
            waiting = self._waiting[job.id]
            waiting.discard(ended)
            if not waiting:
                del self._waiting[job.id]

    def _count(self, job: Job, result: Mapping[str, Any]) -> None:
        work = JobWork(result["model"], result["input_megapixels"], result["output_megapixels"])
        self._usage.add(job.api, job.owner, work, len(result["images"]))

    def _on_end(self, job_id: str) -> None:
        for event in self._waiting.get(job_id, ()):
            event.set()
        self._sender.wake()

    async def _clean(self) -> None:
        while True:
            try:
                await self._clean_once()
            except (StoreUnavailable, OSError) as error:
                _log.error("old jobs cannot be deleted: %s", error)
            except Exception:
                _log.exception("old jobs cannot be deleted because of a fault")
            await asyncio.sleep(CLEAN_SECONDS)

    async def _clean_once(self) -> None:
        for job in await self._store.expire():
            JOBS_ENDED.labels(job.api, "expired").inc()
            self._on_end(job.id)
        deletable = await self._store.deletable()
        for job in deletable:
            await self._images.delete(job)
        if deletable:
            # After the images: what is interrupted between both is found again.
            await self._store.delete([job.id for job in deletable])
        await self._uploads.expire()
        for state, count in (await self._store.count_open()).items():
            JOBS_OPEN.labels(state).set(count)
        WEBHOOKS_WAITING.set(await self._outbox.count())


@asynccontextmanager
async def open_jobs(
    settings: JobSettings,
    client: AsyncClient,
    results: ResultStore,
    outbound: Outbound,
    *,
    link_seconds: float,
    usage: Usage,
) -> AsyncIterator[Jobs]:
    """Runs jobs for the duration of the block.

    Args:
        settings: of the jobs.
        client: of the orchestrator.
        results: keeps the images.
        outbound: calls webhooks.
        link_seconds: time for which a link to an image works.
        usage: counts the jobs that succeed.

    Raises:
        SettingsError: the database or the file of the secret cannot be used.
    """
    path = settings.secret_path
    if path is None:
        raise SettingsError("\n".join(settings.problems()))
    try:
        secret = await asyncio.to_thread(read_secret, path, create=not settings.jobs_secret_file)
    except SecretError as error:
        raise SettingsError(f"KLEIN_JOBS_SECRET_FILE: {error}") from None
    jobs = Jobs(
        settings=settings,
        database=JobDatabase(settings.database_url),
        secret=secret,
        images=JobImages(client, results, secret),
        forms=JobForms(results, link_seconds, usage.prices),
        post=webhook_post(outbound, settings.webhook_timeout_seconds),
        models=ModelDirectory(client, settings.aliases),
        usage=usage,
    )
    async with AsyncExitStack() as stack:
        stack.push_async_callback(jobs.close)
        try:
            await jobs.start()
        except StoreUnavailable as error:
            raise SettingsError(f"KLEIN_JOBS_DATABASE: {error}") from None
        yield jobs


def new_seed() -> int:
    """Returns a random seed, for a job whose client gave none."""
    return secrets.randbelow(MAXIMUM_SEED + 1)


_STATUSES: dict[type[JobStoreError], tuple[HTTPStatus, str, Callable[[JobStoreError], float | None]]] = {
    JobNotFound: (HTTPStatus.NOT_FOUND, "not_found", lambda error: None),
    IdempotencyConflict: (HTTPStatus.CONFLICT, "idempotency_conflict", lambda error: None),
    QueueFull: (HTTPStatus.TOO_MANY_REQUESTS, "queue_full", lambda error: BUSY_SECONDS),
    UploadsFull: (HTTPStatus.TOO_MANY_REQUESTS, "uploads_full", lambda error: BUSY_SECONDS),
    StoreUnavailable: (HTTPStatus.SERVICE_UNAVAILABLE, "jobs_unavailable", lambda error: BUSY_SECONDS),
}


@contextmanager
def _reported() -> Iterator[None]:
    """Raises errors of the store as those of the API; the reason of a failed database is for the log only."""
    try:
        yield
    except JobStoreError as error:
        status, reason, retry = _STATUSES[type(error)]
        message = str(error)
        if isinstance(error, StoreUnavailable):
            _log.error("a request failed: %s", error)
            message = "the gateway's jobs are not available for the moment"
        raise ApiError(
            status, reason, message[:1].upper() + message[1:] + ".", retry_after_seconds=retry(error)
        ) from None
