"""Outbox of webhooks: calls that wait in the database until a receiver has taken them or all attempts are used."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from klein_services.gateway.job import WebhookEvent
from klein_services.gateway.job_database import DELIVERIES, JobDatabase, clock
from klein_services.gateway.job_rows import new_id

ATTEMPT_SECONDS = 60.0
"""Time after which a call that a gateway has taken and not ended is taken by another one."""
FIRST_PAUSE_SECONDS = 5.0
PAUSE_FACTOR = 4.0
LONGEST_PAUSE_SECONDS = 3600.0
_JITTER = 0.2


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """Call of a webhook that this gateway makes."""

    id: str
    """Id of the message; every attempt has the same, so that receivers recognize a repetition."""
    job_id: str
    event: WebhookEvent
    url: str
    secret: str | None
    body: str
    attempts: int
    """Attempts, this one included."""
    lease: str


class WebhookOutbox:
    """Waiting calls of the database.

    Args:
        database: an open database.
        attempts: most attempts of the call that reports a job's end. Others have one: the next report replaces them.
    """

    def __init__(self, database: JobDatabase, *, attempts: int) -> None:
        self._database = database
        self._attempts = attempts

    async def claim(self, limit: int) -> Sequence[Delivery]:
        """Takes calls that are due; of each job only the oldest, so that receivers get events in order.

        Raises:
            StoreUnavailable: the database failed.
        """

        async def work(connection: AsyncConnection) -> Sequence[Delivery]:
            earlier = DELIVERIES.alias()
            is_oldest = ~(
                select(earlier.c.id)
                .where(earlier.c.job_id == DELIVERIES.c.job_id, earlier.c.position < DELIVERIES.c.position)
                .exists()
            )
            due = (
                select(DELIVERIES.c.id)
                .where(DELIVERIES.c.available_at <= clock(), is_oldest)
                .order_by(DELIVERIES.c.available_at)
                .limit(limit)
                .with_for_update(skip_locked=True)
            )
            ids = (await connection.scalars(due)).all()
            if not ids:
                return []
            lease = new_id()
            change = (
                update(DELIVERIES)
                .where(DELIVERIES.c.id.in_(ids))
                .values(
                    attempts=DELIVERIES.c.attempts + 1, available_at=clock() + ATTEMPT_SECONDS, lease=lease
                )
            )
            rows = await connection.execute(change.returning(DELIVERIES))
            return [
                Delivery(
                    id=row.id,
                    job_id=row.job_id,
                    event=WebhookEvent(row.event),
                    url=row.url,
                    secret=row.secret,
                    body=row.body,
                    attempts=row.attempts,
                    lease=lease,
                )
                for row in rows
            ]

        return await self._database.write(work)

    async def remove(self, delivery: Delivery) -> None:
        """Removes a call that the receiver has taken, or that is given up.

        Raises:
            StoreUnavailable: the database failed.
        """
        taken = (DELIVERIES.c.id == delivery.id) & (DELIVERIES.c.lease == delivery.lease)
        await self._database.write(lambda connection: connection.execute(delete(DELIVERIES).where(taken)))

    async def postpone(self, delivery: Delivery) -> bool:
        """Plans the next attempt of a call that failed; removes it and returns false when there is none left.

        Raises:
            StoreUnavailable: the database failed.
        """
        most = self._attempts if delivery.event is WebhookEvent.COMPLETED else 1
        if delivery.attempts >= most:
            await self.remove(delivery)
            return False
        pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * PAUSE_FACTOR ** (delivery.attempts - 1))
        pause *= random.uniform(1 - _JITTER, 1 + _JITTER)
        taken = (DELIVERIES.c.id == delivery.id) & (DELIVERIES.c.lease == delivery.lease)
        change = update(DELIVERIES).where(taken).values(available_at=clock() + pause, lease=None)
        await self._database.write(lambda connection: connection.execute(change))
        return True

    async def count(self) -> int:
        """Returns the number of calls that wait.

        Raises:
            StoreUnavailable: the database failed.
        """
        query = select(func.count()).select_from(DELIVERIES)
        return await self._database.read(lambda connection: connection.scalar(query)) or 0
