"""A real gateway with jobs before a real orchestrator with fake stages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx2

from klein_services.gateway.server import running_gateway
from klein_services.gateway.settings import GatewaySettings
from tests.services.fakes.fake_stages import MODEL
from tests.services.fakes.orchestrator_suite import FakeSuite

ALIASES = f"flux-2-klein-4b={MODEL},flux-2-klein-9b=not-routed"
PNG = b"\x89PNG\r\n\x1a\n" + b"pixels"


@dataclass
class JobSuite:
    """Gateway and suite; `settings` are the gateway's."""

    suite: FakeSuite
    url: str
    http: httpx2.AsyncClient
    settings: dict[str, object] = field(default_factory=dict)

    async def post(self, path: str, body: object, **headers: str) -> httpx2.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.http.post(path, json=body, headers=named)

    async def get(self, path: str, **headers: str) -> httpx2.Response:
        return await self.http.get(path, headers={n.replace("_", "-"): v for n, v in headers.items()})

    async def polled(self, url: str, **headers: str) -> dict:
        """Polls as BFL's documentation has it, until the status is final."""
        async with asyncio.timeout(60):
            while True:
                answer = (await self.get(url, **headers)).json()
                if answer["status"] not in ("Pending", "starting", "processing"):
                    return answer
                await asyncio.sleep(0.05)


@asynccontextmanager
async def job_suite(suite: FakeSuite | None = None, **settings: object) -> AsyncIterator[JobSuite]:
    async with (suite or FakeSuite()).running() as running:
        defaults: dict = {"target": running.address, "model_aliases": ALIASES, "job_lease_seconds": 2.0}
        async with running_gateway(GatewaySettings(**(defaults | settings))) as url:
            async with httpx2.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
                yield JobSuite(running, url, http, settings)
