"""Job store on a real PostgreSQL: its contract, and two gateways that share a queue."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from klein_services.gateway.job import StoreUnavailable
from klein_services.gateway.job_database import JobDatabase
from tests.services.gateway.job_contract import Gateway, JobStoreContract, new_job

pytestmark = pytest.mark.deploy
_NUMBERS = itertools.count(1)


def _programs() -> Path:
    """Folder of PostgreSQL's programs, which Debian does not put on PATH."""
    if found := sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        return found[-1].parent
    pytest.skip("there is no PostgreSQL here: run apt-get install postgresql")


class Cluster:
    """PostgreSQL in a temporary folder, reached by a socket there; run by a user without rights."""

    def __init__(self) -> None:
        self._programs = _programs()
        # Short, because the path of a socket has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
        self._user = 65534 if os.geteuid() == 0 else None
        if self._user is not None:
            os.chown(self.folder, self._user, self._user)
        self._run("initdb", "-D", self.folder / "data", "-U", "klein", "-A", "trust", "--no-sync")
        self.start()

    def start(self) -> None:
        options = f"-c listen_addresses='' -c unix_socket_directories={self.folder} -c fsync=off"
        self._run(
            "pg_ctl", "-D", self.folder / "data", "-l", self.folder / "log", "-w", "-o", options, "start"
        )

    def stop(self) -> None:
        self._run("pg_ctl", "-D", self.folder / "data", "-m", "immediate", "-w", "stop")

    def new_database(self) -> str:
        name = f"jobs{next(_NUMBERS)}"
        self._run("createdb", "-h", self.folder, "-U", "klein", name)
        return f"postgresql://klein@/{name}?host={self.folder}"

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def _run(self, program: str, *arguments: object) -> None:
        done = subprocess.run(
            [self._programs / program, *map(str, arguments)],
            user=self._user,
            extra_groups=[] if self._user is not None else None,
            cwd="/",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            env=os.environ | {"LC_ALL": "C"},
        )
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("psycopg", reason="the extra `postgres` is not installed")
    cluster = Cluster()
    yield cluster
    cluster.close()


@pytest.fixture
def database_url(cluster: Cluster) -> str:
    return cluster.new_database()


class TestPostgresJobStore(JobStoreContract):
    """The contract, on PostgreSQL."""


async def test_a_server_that_restarts_is_unavailable_and_then_used_again(cluster, database_url):
    gateway = Gateway(database_url)
    assert not await gateway.database.open()
    try:
        job, _ = await gateway.store.create(new_job())
        cluster.stop()
        with pytest.raises(StoreUnavailable, match="the job database failed"):
            await gateway.store.get("ann", job.id)
        cluster.start()
        assert (await gateway.store.get("ann", job.id)).id == job.id
        assert (await gateway.queue.claim()).job.id == job.id
    finally:
        await gateway.database.close()


async def test_a_database_that_does_not_exist(cluster):
    database = JobDatabase(f"postgresql://klein@/none?host={cluster.folder}")
    with pytest.raises(StoreUnavailable, match='database "none" does not exist'):
        await database.open()
    await database.close()
