"""Server-sent events of a prediction: its log, its images, and the end."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing

from starlette.responses import StreamingResponse

from klein_services.gateway.job import Job, JobState
from klein_services.gateway.jobs import Jobs

SILENCE_LOOKS = 30
"""Looks at a job without change after which a comment is sent, so that proxies keep the connection."""
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def prediction_stream(jobs: Jobs, job: Job) -> StreamingResponse:
    """Returns the response that streams a job's events, also those of a job that has ended."""
    return StreamingResponse(_events(jobs, job), media_type="text/event-stream", headers=HEADERS)


async def _events(jobs: Jobs, job: Job) -> AsyncIterator[str]:
    number, shown_log, silent = 0, "", 0

    def event(name: str, data: str) -> str:
        nonlocal number, silent
        number, silent = number + 1, 0
        lines = "".join(f"data: {line}\n" for line in data.split("\n"))
        return f"event: {name}\nid: {job.id}:{number}\n{lines}\n"

    async with aclosing(jobs.watch(job)) as states:
        async for current in states:
            prediction = jobs.forms.prediction(current)
            silent += 1
            if prediction["logs"] and prediction["logs"] != shown_log:
                shown_log = prediction["logs"]
                yield event("logs", shown_log.rstrip("\n"))
            for url in prediction["output"] or ():
                yield event("output", url)
            if current.state is JobState.FAILED:
                yield event("error", json.dumps({"detail": prediction["error"]}))
            if current.state.final:
                reason = {JobState.CANCELED: "canceled", JobState.FAILED: "error"}.get(current.state)
                yield event("done", json.dumps({"reason": reason} if reason else {}))
            elif silent >= SILENCE_LOOKS:
                silent = 0
                yield ": waiting\n\n"
