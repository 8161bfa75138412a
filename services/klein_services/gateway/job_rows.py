"""Rows of the job database as jobs, and the events of a job's life that its webhook waits for."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from sqlalchemy import delete, insert
from sqlalchemy.engine import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from klein_services.gateway.job import Job, JobError, JobState, Webhook, WebhookEvent
from klein_services.gateway.job_database import DELIVERIES, JOBS, clock

WebhookBody = Callable[[Job, WebhookEvent], str]
"""Body of the call of a job's webhook, in the form of the job's API."""
_ORDER = (WebhookEvent.START, WebhookEvent.LOGS, WebhookEvent.OUTPUT, WebhookEvent.COMPLETED)
COLUMNS = [JOBS.c[name] for name in Job.__dataclass_fields__]
"""Columns of a job, without those of its lease."""


def new_id() -> str:
    """Returns a random id of 26 characters."""
    return secrets.token_hex(13)


def job_of(row: Row[*tuple[Any, ...]]) -> Job:
    """Returns the job of a row of `COLUMNS`."""
    values = {name: row._mapping[name] for name in Job.__dataclass_fields__}
    values["state"] = JobState(values["state"])
    if values["error"] is not None:
        values["error"] = JobError(**values["error"])
    if values["webhook"] is not None:
        values["webhook"] = webhook_of(values["webhook"])
    return Job(**values)


def webhook_of(value: dict[str, Any]) -> Webhook:
    """Returns the webhook of a JSON value that `webhook_json` made."""
    events = frozenset(map(WebhookEvent, value["events"]))
    return Webhook(url=value["url"], secret=value["secret"], events=events)


def webhook_json(webhook: Webhook | None) -> dict[str, Any] | None:
    """Returns a webhook as a JSON value."""
    return None if webhook is None else asdict(webhook) | {"events": sorted(webhook.events)}


async def post_events(
    connection: AsyncConnection, job: Job, events: Iterable[WebhookEvent], body: WebhookBody
) -> None:
    """Puts calls of a job's webhook into the store, in the transaction that changes the job.

    An event of a kind that still waits is replaced: receivers want the last state, and the number stays bounded.
    """
    webhook = job.webhook
    for event in events:
        if webhook is None or event not in webhook.events:
            continue
        waiting = (DELIVERIES.c.job_id == job.id) & (DELIVERIES.c.event == event)
        await connection.execute(delete(DELIVERIES).where(waiting))
        values = {
            "id": new_id(),
            "job_id": job.id,
            "event": event,
            "position": _ORDER.index(event),
            "url": webhook.url,
            "secret": webhook.secret,
            "body": body(job, event),
            "attempts": 0,
            "available_at": clock(),
        }
        await connection.execute(insert(DELIVERIES).values(values))
