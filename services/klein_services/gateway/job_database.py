"""Database of the jobs: its tables, its clock and its transactions, on SQLite or PostgreSQL."""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, Any, TypeVar

from sqlalchemy import (
    JSON,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    event,
    insert,
    select,
    text,
)
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError, OperationalError, TimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from klein_services.gateway.job import StoreUnavailable

SCHEMA_VERSION = 1
"""Version of the tables; a database of a later one is refused."""
POOL_CONNECTIONS = 8
_SCHEMA_LOCK = 0x6B6C6569
"""Number of the advisory lock under which PostgreSQL's tables are made and jobs are counted."""
_Value = TypeVar("_Value")
_WRITES = "klein_writes"

metadata = MetaData()
SCHEMA = Table("klein_schema", metadata, Column("version", Integer, nullable=False))
JOBS = Table(
    "klein_jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("api", String(32), nullable=False),
    Column("idempotency_key", String(256)),
    Column("digest", String(64), nullable=False),
    Column("request", JSON, nullable=False),
    Column("echo", JSON, nullable=False),
    Column("credential", Text),
    Column("state", String(16), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("deadline_at", Double, nullable=False),
    Column("available_at", Double, nullable=False),
    Column("started_at", Double),
    Column("completed_at", Double),
    Column("expires_at", Double),
    Column("attempts", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("step_count", Integer, nullable=False),
    Column("lease", String(64)),
    Column("lease_expires_at", Double),
    Column("result", JSON(none_as_null=True)),
    Column("error", JSON(none_as_null=True)),
    Column("webhook", JSON(none_as_null=True)),
    UniqueConstraint("owner", "idempotency_key"),
    Index("klein_jobs_queue", "state", "available_at"),
    Index("klein_jobs_of_owner", "owner", "created_at"),
    Index("klein_jobs_expiry", "expires_at"),
)
JOB_FILES = Table(
    "klein_job_files",
    metadata,
    Column("job_id", ForeignKey(JOBS.c.id, ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("data", LargeBinary, nullable=False),
)
DELIVERIES = Table(
    "klein_webhook_deliveries",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("job_id", String(64), nullable=False),
    Column("event", String(16), nullable=False),
    Column("position", Integer, nullable=False),
    Column("url", Text, nullable=False),
    Column("secret", Text),
    Column("body", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("available_at", Double, nullable=False),
    Column("lease", String(64)),
    UniqueConstraint("job_id", "event"),
    Index("klein_webhook_deliveries_due", "available_at"),
)
UPLOADS = Table(
    "klein_uploads",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("name", Text, nullable=False),
    Column("content_type", String(128), nullable=False),
    Column("size", Integer, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("data", LargeBinary, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Index("klein_uploads_of_owner", "owner", "created_at"),
)


class clock(FunctionElement[float]):
    """Seconds since 1970 by the database's clock: gateways whose clocks differ agree on it."""

    type = Double()
    inherit_cache = True


@compiles(clock, "sqlite")
def _sqlite_clock(element: clock, compiler: Any, **options: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(clock, "postgresql")
def _postgresql_clock(element: clock, compiler: Any, **options: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"


def database_problem(url: str) -> str:
    """Returns the reason why an address cannot be that of a job database; empty when it can."""
    try:
        _parsed(url)
    except ValueError as error:
        return str(error)
    return ""


class JobDatabase:
    """Connections to the job database.

    Args:
        url: `sqlite:///PATH` or `postgresql://USER:PASSWORD@HOST/NAME`.
        busy_seconds: time to wait for a lock or a free connection.

    Raises:
        ValueError: the address is of neither kind.
    """

    def __init__(self, url: str, *, busy_seconds: float = 5.0) -> None:
        self._url = _parsed(url)
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        options: dict[str, Any] = {
            "pool_timeout": busy_seconds,
            "pool_size": POOL_CONNECTIONS,
            "max_overflow": 0,
        }
        if self.is_sqlite:
            options["connect_args"] = {"timeout": busy_seconds}
        else:
            # Connections that a restart of the server or a firewall has cut are replaced unseen.
            options["pool_pre_ping"] = True
            # Of a database without an encoding the driver would return bytes.
            timeout = max(1, round(busy_seconds))
            options["connect_args"] = {"connect_timeout": timeout, "client_encoding": "utf8"}
        self._engine: AsyncEngine = create_async_engine(self._url, **options)
        if self.is_sqlite:
            event.listen(self._engine.sync_engine, "connect", _on_sqlite_connect)
            event.listen(self._engine.sync_engine, "begin", _on_sqlite_begin)
        # SQLite's own wait for a lock is a poll; within a process a queue is fair and faster.
        self._writer = asyncio.Lock() if self.is_sqlite else None
        self._lock_file: IO[bytes] | None = None

    async def open(self) -> bool:
        """Makes the tables where there are none; returns whether this is the only process that has the database open.

        Raises:
            StoreUnavailable: the database does not answer or cannot be written, or is of a later version.
        """
        alone = await asyncio.to_thread(self._lock) if self.is_sqlite else False
        await self.write(self._prepare, exclusive=True)
        return alone

    async def close(self) -> None:
        """Closes all connections."""
        await self._engine.dispose()
        if self._lock_file is not None:
            self._lock_file.close()

    async def read(self, work: Callable[[AsyncConnection], Awaitable[_Value]]) -> _Value:
        """Runs a transaction that only reads; cancellation waits for its end.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        return await _uninterrupted(self._transaction(work, writes=False, exclusive=False))

    async def write(
        self, work: Callable[[AsyncConnection], Awaitable[_Value]], *, exclusive: bool = False
    ) -> _Value:
        """Runs a transaction that writes; cancellation waits for its end.

        Args:
            work: the transaction.
            exclusive: whether no other exclusive transaction may run at the same time, in any gateway.

        Raises:
            StoreUnavailable: the database does not answer, is locked or cannot be written.
        """
        if self._writer is None:
            return await _uninterrupted(self._transaction(work, writes=True, exclusive=exclusive))
        async with self._writer:
            return await _uninterrupted(self._transaction(work, writes=True, exclusive=False))

    async def _transaction(
        self, work: Callable[[AsyncConnection], Awaitable[_Value]], *, writes: bool, exclusive: bool
    ) -> _Value:
        try:
            async with self._engine.connect() as connection:
                await connection.execution_options(**{_WRITES: writes})
                async with connection.begin():
                    if exclusive:
                        await connection.execute(text(f"SELECT pg_advisory_xact_lock({_SCHEMA_LOCK})"))
                    return await work(connection)
        except (OperationalError, TimeoutError, OSError) as error:
            raise StoreUnavailable(f"the job database failed: {_cause(error)}") from error
        except DBAPIError as error:
            # SQLite has no class of its own for a file that is damaged or no database.
            if error.connection_invalidated or type(error) is DatabaseError:
                raise StoreUnavailable(f"the job database failed: {_cause(error)}") from error
            raise

    async def _prepare(self, connection: AsyncConnection) -> None:
        await connection.run_sync(metadata.create_all)
        version = await connection.scalar(select(SCHEMA.c.version))
        if version is None:
            await connection.execute(insert(SCHEMA).values(version=SCHEMA_VERSION))
        elif version != SCHEMA_VERSION:
            raise StoreUnavailable(
                f"the job database has tables of version {version}; this gateway needs version {SCHEMA_VERSION}"
            )

    def _lock(self) -> bool:
        """Takes a share of the lock on the file next to SQLite's; the kernel gives it back when the process ends."""
        path = Path(f"{self._url.database}.lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock_file = path.open("ab")
            try:
                fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                alone = False
            fcntl.flock(self._lock_file, fcntl.LOCK_SH)
        except OSError as error:
            raise StoreUnavailable(f"the job database cannot be opened: {path}: {error.strerror}") from error
        return alone


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ValueError("it must be sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME") from None
    backend = parsed.get_backend_name()
    if backend == "sqlite" and parsed.database and parsed.database != ":memory:":
        return parsed.set(drivername="sqlite+aiosqlite")
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    raise ValueError("it must be sqlite:///PATH, not in memory, or postgresql://USER:PASSWORD@HOST/NAME")


def _on_sqlite_connect(connection: Any, record: object) -> None:
    # Python's driver begins transactions by itself, and none that takes the lock at once.
    connection.isolation_level = None
    cursor = connection.cursor()
    for statement in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {statement}")
    cursor.close()


def _on_sqlite_begin(connection: Connection) -> None:
    # A transaction that reads first and writes later fails at once when another has written in between.
    writes = connection.get_execution_options().get(_WRITES, True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _cause(error: BaseException) -> str:
    """Returns a database's own words, without the statement and its values."""
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]


async def _uninterrupted(work: Awaitable[_Value]) -> _Value:
    """Awaits a transaction to its end even when the task is cancelled: a half one would hold its lock."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if not task.done():
            await asyncio.wait([task])
        if not task.cancelled():
            # Else asyncio complains that nothing has looked at it.
            task.exception()
        raise
