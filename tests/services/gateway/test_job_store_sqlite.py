"""Job store on SQLite: its contract, its file, and the start after a crash."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import insert

from klein_services.gateway.job import JobState, StoreUnavailable
from klein_services.gateway.job_database import JOBS, JobDatabase, database_problem
from klein_services.gateway.job_store import JobLimits
from tests.services.gateway.job_contract import Gateway, JobStoreContract, new_job


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/jobs.sqlite"


class TestSqliteJobStore(JobStoreContract):
    """The contract, on a file."""


async def test_the_only_gateway_takes_up_its_jobs_at_once(database_url):
    first, second, third = (Gateway(database_url, lease_seconds=3600) for _ in range(3))
    assert await first.database.open()
    try:
        job, _ = await first.store.create(new_job())
        assert await first.queue.claim() is not None
        # As long as another process has the file open, its leases hold.
        assert not await second.database.open()
        await second.database.close()
    finally:
        await first.database.close()
    assert await third.database.open()
    try:
        assert await third.queue.claim() is None
        assert await third.queue.give_back_all() == 1
        leased = await third.queue.claim()
        assert (leased.job.id, leased.taken_over) == (job.id, True)
    finally:
        await third.database.close()


async def test_a_locked_file_is_unavailable_and_recovers(tmp_path, database_url):
    gateway = Gateway(database_url)
    gateway.database = JobDatabase(database_url, busy_seconds=0.2)
    gateway.store._database = gateway.database
    await gateway.database.open()
    try:
        other = sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="database is locked"):
            await gateway.store.create(new_job())
        # Reading goes on.
        assert await gateway.store.count_open() == {JobState.QUEUED: 0, JobState.RUNNING: 0}
        other.execute("COMMIT")
        other.close()
        assert (await gateway.store.create(new_job()))[1]
    finally:
        await gateway.database.close()


async def test_thousands_of_jobs(database_url):
    gateway = Gateway(database_url, JobLimits(open_jobs=3000, open_jobs_of_owner=3000))
    await gateway.database.open()
    try:
        values = {
            "request": {},
            "echo": {},
            "api": "bfl",
            "digest": "",
            "attempts": 0,
            "step": 0,
            "step_count": 0,
        }
        times = {"created_at": 1.0, "deadline_at": 1e12, "available_at": 1.0, "state": "queued"}
        rows = [values | times | {"id": f"{index:05}", "owner": f"key-{index % 7}"} for index in range(2999)]
        await gateway.database.write(lambda connection: connection.execute(insert(JOBS), rows))
        assert (await gateway.store.create(new_job("ann")))[1]
        for index in range(50):
            leased = await gateway.queue.claim()
            assert (
                leased.job.owner == ([f"key-{owner}" for owner in range(7)] + ["ann"])[index % 8]
                or index >= 8
            )
    finally:
        await gateway.database.close()


@pytest.mark.parametrize(
    "url", ["", "jobs.sqlite", "sqlite://", "sqlite:///:memory:", "mysql://host/name", "postgres//x"]
)
def test_addresses_that_are_no_job_database(url):
    assert "sqlite:///PATH" in database_problem(url)


def test_addresses_of_job_databases():
    assert database_problem("sqlite:////var/lib/klein/jobs.sqlite") == ""
    assert database_problem("postgresql://user:secret@host/name") == ""


async def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "jobs.sqlite", Path("/proc/jobs.sqlite")):
        database = JobDatabase(f"sqlite:///{path}")
        with pytest.raises(StoreUnavailable, match="cannot be opened"):
            await database.open()
        await database.close()


async def test_a_file_that_is_no_database(tmp_path):
    path = tmp_path / "jobs.sqlite"
    path.write_bytes(b"something else " * 100)
    database = JobDatabase(f"sqlite:///{path}")
    with pytest.raises(StoreUnavailable, match="not a database"):
        await database.open()
    await database.close()


_WRITER = """
import asyncio, sys
from klein_services.gateway.job_database import JobDatabase
from klein_services.gateway.job import StoreUnavailable

async def main():
    database = JobDatabase(sys.argv[1])
    try:
        await database.open()
    except StoreUnavailable as error:
        print(error)
    finally:
        await database.close()
asyncio.run(main())
"""


def test_a_read_only_file(tmp_path, database_url):
    async def make_tables() -> None:
        database = JobDatabase(database_url)
        await database.open()
        await database.close()

    asyncio.run(make_tables())
    for path in tmp_path.iterdir():
        path.chmod(0o444)
    tmp_path.chmod(0o555)
    command = [sys.executable, "-c", _WRITER, database_url]
    if os.geteuid() == 0:
        # Root without the right to ignore the modes of its files.
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert "the job database cannot be opened" in done.stdout, done.stderr
    assert "Permission denied" in done.stdout
