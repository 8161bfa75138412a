"""Settings of the gateway's jobs and webhooks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from klein_services.gateway.job_database import database_problem
from klein_services.runtime.settings import ProcessSettings, setting

NO_JOBS = "off"
"""The `jobs_database` that turns the APIs with jobs off."""


@dataclass(frozen=True, kw_only=True)
class JobSettings(ProcessSettings):
    """Database, bounds and times of jobs."""

    jobs_database: str = setting(
        "",
        help="Database of jobs: sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME; empty: klein/jobs.sqlite in "
        "XDG_STATE_HOME; off: no API with jobs",
    )
    jobs_secret_file: str = setting(
        "",
        help="File of at least 32 secret bytes that seal the keys of jobs and sign webhooks, the same for all gateways "
        "of a database; empty: made next to SQLite's file",
    )
    jobs_running: int = setting(8, help="Jobs that this gateway runs at a time", minimum=1, maximum=10000)
    jobs_limit: int = setting(
        1000, help="Jobs of the database that may wait or run; more get 429", minimum=1, maximum=10**6
    )
    jobs_limit_of_key: int = setting(
        100, help="Jobs of one key that may wait or run; more get 429", minimum=1, maximum=10**6
    )
    job_timeout_seconds: float = setting(
        3600.0, help="Seconds within which a job must end, its wait included", minimum=1, maximum=604800
    )
    job_retention_seconds: float = setting(
        86400.0,
        help="Seconds for which an ended job, its images and uploaded files are kept",
        minimum=1,
        maximum=31536000,
    )
    job_lease_seconds: float = setting(
        30.0,
        help="Seconds after which another gateway takes over the jobs of one that has stopped",
        minimum=1,
        maximum=3600,
    )
    uploads_limit_mib: int = setting(
        1024, help="MiB of all uploaded files in the database; more get 429", minimum=1, maximum=10**6
    )
    webhook_attempts: int = setting(
        8,
        help="Attempts of the call that reports the end of a job, with pauses from 5 s to an hour",
        minimum=1,
        maximum=30,
    )
    webhook_timeout_seconds: float = setting(
        10.0, help="Seconds that a call of a webhook may take", minimum=0.1, maximum=50
    )
    model_aliases: str = setting(
        "flux-2-klein-4b=klein-4b,flux-2-klein-9b=klein-9b,flux-2-klein-9b-preview=klein-9b-kv",
        help="Names of models in the APIs with jobs, ALIAS=MODEL separated by commas; others are names of models",
    )

    @property
    def database_url(self) -> str:
        """URL of the job database."""
        if self.jobs_database:
            return self.jobs_database
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        return f"sqlite:///{Path(state) / 'klein' / 'jobs.sqlite'}"

    @property
    def secret_path(self) -> Path | None:
        """File of the secret; `None` where it must be set and is not."""
        if self.jobs_secret_file:
            return Path(self.jobs_secret_file)
        kind, _, path = self.database_url.partition(":///")
        return Path(f"{path.partition('?')[0]}.secret") if kind.startswith("sqlite") else None

    @property
    def aliases(self) -> dict[str, str]:
        """Models by their aliases."""
        pairs = (entry.partition("=") for entry in self.model_aliases.split(",") if entry.strip())
        return {alias.strip(): model.strip() for alias, _, model in pairs}

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not all(alias and model for alias, model in self.aliases.items()):
            yield f"KLEIN_MODEL_ALIASES is {self.model_aliases!r}; each entry must be ALIAS=MODEL"
        if self.jobs_database == NO_JOBS:
            return
        if problem := database_problem(self.database_url):
            # Without the value, which may hold a password.
            yield f"KLEIN_JOBS_DATABASE: {problem}"
        elif self.secret_path is None:
            yield "KLEIN_JOBS_SECRET_FILE is empty; with PostgreSQL it must name a file that all gateways share"
