"""What the step loop tells Prometheus."""

from __future__ import annotations

from services.denoiser.job import Job, Plan
from services.runtime import metrics

STAGE = "denoiser"
OPERATION = "denoise"


def observe_step(plan: Plan, seconds: float, token_budget: int) -> None:
    """Books one step. Without a budget an image fills its step."""
    metrics.STEP_SECONDS.observe(seconds)
    metrics.STEP_TOKENS.observe(plan.tokens)
    metrics.STEP_REQUESTS.observe(len({unit.job.sequence for unit in plan.units}))
    metrics.STEP_OCCUPANCY.set(plan.tokens / max(token_budget, plan.tokens))


def observe_budget(tokens: int) -> None:
    metrics.STEP_TOKEN_BUDGET.set(tokens)


def observe_load(queued_count: int, running_count: int) -> None:
    metrics.QUEUE_DEPTH.labels(STAGE).set(queued_count)
    metrics.RUNNING.labels(STAGE).set(running_count)


def observe_started(queue_seconds: float) -> None:
    metrics.QUEUE_WAIT_SECONDS.labels(STAGE).observe(queue_seconds)


def observe_finished(job: Job) -> None:
    metrics.STAGE_SECONDS.labels(STAGE, OPERATION).observe(job.spent_seconds)


def observe_abandoned(job: Job, *, is_late: bool) -> None:
    """Books a request that nobody waited for when it left."""
    metrics.ABANDONED_SECONDS.labels(STAGE).inc(job.spent_seconds)
    if is_late:
        metrics.DEADLINE_MISSED.labels(STAGE).inc()
