"""Forms in which the APIs of the gateway show a job."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from klein_services.gateway.job import Job, JobState, WebhookEvent
from klein_services.gateway.result_store import ResultStore
from klein_services.gateway.usage import PriceTable

BFL = "bfl"
PREDICTIONS = "predictions"
EACHLABS = "eachlabs"

_PREDICTION_STATUS = {
    JobState.QUEUED: "starting",
    JobState.RUNNING: "processing",
    JobState.SUCCEEDED: "succeeded",
    JobState.FAILED: "failed",
    JobState.CANCELED: "canceled",
}
_EACHLABS_STATUS = _PREDICTION_STATUS | {JobState.SUCCEEDED: "success", JobState.QUEUED: "processing"}
_MODERATED = {"CONTENT_DENIED_REQUEST": "Request Moderated", "CONTENT_DENIED_IMAGE": "Content Moderated"}


class JobForms:
    """Forms of jobs.

    Args:
        results: has the images.
        link_seconds: time for which a link to an image works.
        prices: of the images.
    """

    def __init__(self, results: ResultStore, link_seconds: float, prices: PriceTable) -> None:
        self._results = results
        self._link_seconds = link_seconds
        self._prices = prices

    def bfl_result(self, job: Job) -> dict[str, Any]:
        """Returns BFL's result of a job, whose status is Pending until the job has ended."""
        body: dict[str, Any] = {"id": job.id, "status": bfl_status(job), "result": None}
        if job.state is JobState.RUNNING:
            body["progress"] = round(job.step / job.step_count, 3) if job.step_count else 0.0
        if job.result is not None and (urls := self._image_urls(job)):
            image, used = job.result["images"][0], job.result
            inputs, outputs = used["input_megapixels"], used["output_megapixels"]
            body["result"] = {
                "sample": urls[0],
                "prompt": job.request["prompt"],
                "seed": image["seed"],
                "width": image["width"],
                "height": image["height"],
                "start_time": job.started_at,
                "end_time": job.completed_at,
                "duration": _duration(job.started_at, job.completed_at),
                "cost": self._prices.cost(used["model"], inputs, outputs),
                "input_mp": round(inputs, 6),
                "output_mp": round(outputs, 6),
            }
        if job.error is not None:
            body["details"] = {"error": job.error.message, "code": job.error.code}
        return body

    def prediction(self, job: Job) -> dict[str, Any]:
        """Returns a job as Replicate shows a prediction."""
        base = f"{job.echo['base_url']}{job.echo['path']}/{job.echo.get('id', job.id)}"
        body: dict[str, Any] = {
            "id": job.echo.get("id", job.id),
            "model": job.echo["model"],
            "version": job.echo["version"],
            "status": _PREDICTION_STATUS[job.state],
            "input": job.echo["input"],
            "output": self._image_urls(job) if job.result is not None else None,
            "logs": _progress_line(job),
            "error": None if job.error is None else job.error.message,
            "data_removed": False,
            "metrics": {},
            "created_at": iso_time(job.created_at),
            "started_at": iso_time(job.started_at),
            "completed_at": iso_time(job.completed_at),
            "urls": {"get": base, "cancel": f"{base}/cancel", "stream": f"{base}/stream"},
        }
        if job.state.final and job.completed_at is not None:
            if job.started_at is not None:
                body["metrics"]["predict_time"] = _duration(job.started_at, job.completed_at)
            body["metrics"]["total_time"] = _duration(job.created_at, job.completed_at)
        if job.result is not None:
            body["metrics"]["image_count"] = len(job.result["images"])
        return body

    def eachlabs(self, job: Job) -> dict[str, Any]:
        """Returns a job as eachlabs shows a prediction; one image is a string, several are a list."""
        urls = self._image_urls(job) if job.result is not None else []
        return {
            "id": job.id,
            "status": _EACHLABS_STATUS[job.state],
            "input": job.echo["input"],
            "output": urls[0] if len(urls) == 1 else urls or None,
            "logs": _progress_line(job),
            "error": None if job.error is None else job.error.message,
            "metrics": {"predict_time": _duration(job.started_at, job.completed_at)},
        }

    def webhook_body(self, job: Job, event: WebhookEvent) -> str:
        """Returns the body of a webhook's call: the job at the moment of the event, in its API's form."""
        forms = {BFL: self.bfl_result, PREDICTIONS: self.prediction, EACHLABS: self.eachlabs}
        return json.dumps(forms[job.api](job), separators=(",", ":"))

    def _image_urls(self, job: Job) -> list[str]:
        return [
            self._results.url(image["key"], job.echo["base_url"], self._link_seconds)
            for image in (job.result or {}).get("images", ())
        ]


def bfl_status(job: Job) -> str:
    """Returns BFL's word for the state of a job."""
    if not job.state.final:
        return "Pending"
    if job.state is JobState.SUCCEEDED:
        return "Ready"
    code = job.error.code if job.error is not None else ""
    return _MODERATED.get(code, "Error")


def _progress_line(job: Job) -> str:
    """Returns the progress as tqdm prints it, which clients of Replicate parse."""
    if not job.step_count:
        return ""
    percentage = round(100 * job.step / job.step_count)
    bar = "█" * (percentage // 10)
    return f"{percentage:3d}%|{bar:<10}| {job.step}/{job.step_count}\n"


def _duration(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else round(end - begin, 3)


def iso_time(seconds: float | None) -> str | None:
    """Returns a time in ISO 8601, UTC."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
