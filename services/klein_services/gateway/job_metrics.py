"""Prometheus metrics of jobs and webhooks."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from klein_services.runtime.metrics import QUEUE_BUCKETS, REQUEST_BUCKETS

APIS = ("bfl", "predictions", "eachlabs")
"""Values of `api`."""
OUTCOMES = ("succeeded", "failed", "canceled", "expired")
JOBS_CREATED = Counter("klein_gateway_jobs_created", "Jobs that clients made, by API.", ["api"])
JOBS_ENDED = Counter(
    "klein_gateway_jobs_ended",
    "Jobs that ended, by API; `outcome` is succeeded, failed, canceled (by the client) or expired.",
    ["api", "outcome"],
)
JOBS_OPEN = Gauge(
    "klein_gateway_jobs_open",
    "Jobs in the database that have not ended; `state` is queued or running. All gateways with it show the same.",
    ["state"],
)
JOBS_RUNNING = Gauge("klein_gateway_jobs_running", "Jobs that this gateway runs.")
JOB_WAIT_SECONDS = Histogram(
    "klein_gateway_job_wait_seconds",
    "Seconds from a job's creation to the begin of its run.",
    ["api"],
    buckets=QUEUE_BUCKETS,
)
JOB_SECONDS = Histogram(
    "klein_gateway_job_duration_seconds", "Seconds of a job's last run.", ["api"], buckets=REQUEST_BUCKETS
)
JOB_RECOVERIES = Counter(
    "klein_gateway_job_recoveries", "Jobs that this gateway took over from one that had stopped."
)
WEBHOOKS = Counter(
    "klein_gateway_webhook_calls",
    "Calls of webhooks; `outcome` is delivered, failed (and tried again) or given_up.",
    ["outcome"],
)
WEBHOOKS_WAITING = Gauge("klein_gateway_webhooks_waiting", "Calls of webhooks that wait in the database.")
WEBHOOK_OUTCOMES = ("delivered", "failed", "given_up")


def initialize_jobs() -> None:
    """Creates the label sets, so that counters exist at 0 before the first job."""
    for api in APIS:
        JOBS_CREATED.labels(api)
        JOB_WAIT_SECONDS.labels(api)
        JOB_SECONDS.labels(api)
        for outcome in OUTCOMES:
            JOBS_ENDED.labels(api, outcome)
    for state in ("queued", "running"):
        JOBS_OPEN.labels(state)
    for outcome in WEBHOOK_OUTCOMES:
        WEBHOOKS.labels(outcome)
