"""Images of a job: its request to the orchestrator, and the faults that end it or let it wait."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import grpc

from klein_client import (
    AsyncClient,
    Cancelled,
    Image,
    KleinError,
    Overloaded,
    Step,
    Summary,
    Unavailable,
)
from klein_services.gateway.job import Job, JobError, LeasedJob
from klein_services.gateway.job_runner import JobFailed, JobPostponed, ReportStep
from klein_services.gateway.job_secret import JobSecret, SecretError
from klein_services.gateway.result_store import ResultStore

LOST_PAUSE_SECONDS = 2.0
"""Mean time before a job whose orchestrator was gone is tried again."""
LONGEST_PAUSE_SECONDS = 60.0
CONTENT_DENIED = "CONTENT_DENIED"
FILE_FIELDS = ("initial_image", "mask")
"""Fields of a job's request that are the position of one file; `references` is a list of positions."""


class JobImages:
    """Maker of the images of jobs.

    Args:
        client: of the orchestrator.
        store: of results, keeps the images.
        secret: unseals the keys of jobs.
    """

    def __init__(self, client: AsyncClient, store: ResultStore, secret: JobSecret) -> None:
        self._client = client
        self._store = store
        self._secret = secret

    async def make(self, leased: LeasedJob, report: ReportStep) -> Mapping[str, Any]:
        """Makes a job's images and returns its result; the same job gives the same images in every run.

        Raises:
            JobFailed: the job cannot succeed.
            JobPostponed: the job may succeed later.
        """
        job = leased.job
        options = self._options(leased)
        images: list[Image] = []
        summary: Summary | None = None
        try:
            async with self._client.stream(job.request["prompt"], **options) as events:
                async for event in events:
                    if isinstance(event, Step):
                        report(event.step, event.step_count)
                    elif isinstance(event, Image):
                        images.append(event)
                    elif isinstance(event, Summary):
                        summary = event
        except KleinError as error:
            raise _verdict(error) from error
        if summary is None:
            raise JobPostponed("the orchestrator's answer ended early", _jittered(LOST_PAUSE_SECONDS))
        images.sort(key=lambda image: image.index)
        for image in images:
            try:
                await self._store.put(image_key(job.id, image.index), image.data, f"image/{image.format}")
            except OSError as error:
                reason = f"an image cannot be stored: {error}"
                raise JobPostponed(reason, _jittered(LOST_PAUSE_SECONDS)) from error
        return {
            "images": [
                {
                    "key": image_key(job.id, image.index),
                    "format": image.format,
                    "seed": image.seed,
                    "width": image.width_px,
                    "height": image.height_px,
                    "bytes": len(image.data),
                }
                for image in images
            ],
            "model": summary.model,
            "input_megapixels": summary.input_megapixels,
            "output_megapixels": summary.output_megapixels,
            "seconds": summary.total_seconds,
            "warnings": list(summary.warnings),
        }

    async def delete(self, job: Job) -> None:
        """Deletes the images of a job, also those that a run has left that did not end it.

        Raises:
            OSError: the store failed.
        """
        count = job.request.get("count") or 1
        for index in range(count):
            await self._store.delete(image_key(job.id, index))

    def _options(self, leased: LeasedJob) -> dict[str, Any]:
        job, files = leased.job, leased.files
        values: dict[str, Any] = {name: value for name, value in job.request.items() if name != "prompt"}
        positions: Sequence[int] = values.pop("references", ())
        if positions:
            values["references"] = [files[position] for position in positions]
        for name in FILE_FIELDS:
            if name in values:
                values[name] = files[values[name]]
        token = ""
        if job.credential is not None:
            try:
                token = self._secret.unseal(job.credential)
            except SecretError as error:
                raise JobFailed(JobError(code="UNAUTHENTICATED", message=f"{error}; make it anew")) from None
        # A run of this job that still goes on, of a gateway that has stopped, is joined and not repeated.
        return values | {"token": token, "idempotency_key": job.id}


def image_key(job_id: str, index: int) -> str:
    """Returns the key of a job's image, the same in every run: what a stopped run has left is overwritten."""
    return f"{job_id}-{index}"


def _verdict(error: KleinError) -> JobFailed | JobPostponed:
    """Returns what a failed request means for its job."""
    if isinstance(error, Overloaded) and error.retry_after_seconds is not None:
        return JobPostponed(error.message, _jittered(min(error.retry_after_seconds, LONGEST_PAUSE_SECONDS)))
    if isinstance(error, Unavailable | Cancelled):
        return JobPostponed(error.message, _jittered(LOST_PAUSE_SECONDS))
    code = error.code.name if isinstance(error.code, grpc.StatusCode) else str(error.code)
    violations = [{"field": each.argument, "description": each.description} for each in error.violations]
    if error.reason == CONTENT_DENIED:
        code = f"{CONTENT_DENIED}_{error.metadata.get('subject', 'request').upper()}"
    return JobFailed(JobError(code=code, message=str(error) or error.message, violations=violations))


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(0.8, 1.2)
