"""Uploaded files: images that clients send once and name in the requests that follow."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from klein_services.gateway.job import JobNotFound, JobStoreError
from klein_services.gateway.job_database import UPLOADS, JobDatabase, clock
from klein_services.gateway.job_rows import new_id

LISTED = 100
"""Most files of a list."""
_FACTS = [column for column in UPLOADS.c if column.name != "data"]


class UploadsFull(JobStoreError):
    """The uploaded files of all keys fill their bound."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """An uploaded file, without its bytes."""

    id: str
    owner: str
    name: str
    content_type: str
    size: int
    sha256: str
    created_at: float
    expires_at: float


class Uploads:
    """Uploaded files of the database.

    Args:
        database: an open database.
        limit_bytes: most bytes of all files.
        retention_seconds: time for which a file is kept.
    """

    def __init__(self, database: JobDatabase, *, limit_bytes: int, retention_seconds: float) -> None:
        self._database = database
        self._limit_bytes = limit_bytes
        self._retention_seconds = retention_seconds

    async def add(self, owner: str, name: str, content_type: str, data: bytes) -> Upload:
        """Keeps a file.

        Raises:
            UploadsFull: there is no room for it.
            StoreUnavailable: the database failed.
        """
        values = {
            "id": new_id(),
            "owner": owner,
            "name": name,
            "content_type": content_type,
            "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "data": data,
            "created_at": clock(),
            "expires_at": clock() + self._retention_seconds,
        }

        async def work(connection: AsyncConnection) -> Upload:
            used = await connection.scalar(select(func.coalesce(func.sum(UPLOADS.c.size), 0))) or 0
            if used + len(data) > self._limit_bytes:
                raise UploadsFull(
                    f"uploaded files fill the {self._limit_bytes >> 20} MiB that the gateway has for them"
                )
            return _upload_of(
                (await connection.execute(insert(UPLOADS).values(values).returning(*_FACTS))).one()
            )

        return await self._database.write(work, exclusive=True)

    async def get(self, owner: str, upload_id: str) -> Upload:
        """Returns a file without its bytes.

        Raises:
            JobNotFound: there is none, or it is another key's.
            StoreUnavailable: the database failed.
        """
        query = select(*_FACTS).where(UPLOADS.c.id == upload_id, UPLOADS.c.owner == owner)

        async def work(connection: AsyncConnection) -> Upload:
            row = (await connection.execute(query)).first()
            if row is None:
                raise JobNotFound(f"there is no file {upload_id!r}")
            return _upload_of(row)

        return await self._database.read(work)

    async def content(self, owner: str, upload_id: str) -> bytes:
        """Returns the bytes of a file.

        Raises:
            JobNotFound: there is none, or it is another key's.
            StoreUnavailable: the database failed.
        """
        query = select(UPLOADS.c.data).where(UPLOADS.c.id == upload_id, UPLOADS.c.owner == owner)
        data = await self._database.read(lambda connection: connection.scalar(query))
        if data is None:
            raise JobNotFound(f"there is no file {upload_id!r}")
        return bytes(data)

    async def list(self, owner: str) -> Sequence[Upload]:
        """Returns the latest files of a key.

        Raises:
            StoreUnavailable: the database failed.
        """
        query = select(*_FACTS).where(UPLOADS.c.owner == owner).order_by(UPLOADS.c.created_at.desc())

        async def work(connection: AsyncConnection) -> Sequence[Upload]:
            return [_upload_of(row) for row in await connection.execute(query.limit(LISTED))]

        return await self._database.read(work)

    async def delete(self, owner: str, upload_id: str) -> None:
        """Deletes a file.

        Raises:
            JobNotFound: there is none, or it is another key's.
            StoreUnavailable: the database failed.
        """
        mine = (UPLOADS.c.id == upload_id) & (UPLOADS.c.owner == owner)
        change = delete(UPLOADS).where(mine).returning(UPLOADS.c.id)
        if await self._database.write(lambda connection: connection.scalar(change)) is None:
            raise JobNotFound(f"there is no file {upload_id!r}")

    async def expire(self) -> None:
        """Deletes files that are older than they are kept.

        Raises:
            StoreUnavailable: the database failed.
        """
        change = delete(UPLOADS).where(UPLOADS.c.expires_at < clock())
        await self._database.write(lambda connection: connection.execute(change))


def _upload_of(row: Any) -> Upload:
    return Upload(**{name: row._mapping[name] for name in Upload.__dataclass_fields__})
