"""Jobs after the death of their gateway: a real process is killed in the middle of a job and started again."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2

from klein_services.cli.process import inherited_environment
from tests.services.fakes.orchestrator_suite import FakeSuite
from tests.services.fakes.runtime_toy import until
from tests.services.gateway.job_contract import Gateway
from tests.services.gateway.job_suite import ALIASES


@asynccontextmanager
async def gateway_process(target: str, port: int, state: Path) -> AsyncIterator[subprocess.Popen[bytes]]:
    environment = inherited_environment() | {
        "KLEIN_TARGET": target,
        "KLEIN_HOST": "127.0.0.1",
        "KLEIN_PORT": str(port),
        "KLEIN_METRICS_PORT": "0",
        "KLEIN_MODEL_ALIASES": ALIASES,
        "KLEIN_DRAIN_DELAY_SECONDS": "0",
        "KLEIN_GRACE_SECONDS": "1",
        "XDG_STATE_HOME": str(state),
        # Longer than the test: a gateway that is alone with its file must not wait for the leases of a dead one.
        "KLEIN_JOB_LEASE_SECONDS": "600",
    }
    process = await asyncio.to_thread(
        subprocess.Popen, [sys.executable, "-m", "klein_services.gateway"], env=environment
    )
    try:
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            async with asyncio.timeout(120):
                while True:
                    assert process.poll() is None
                    try:
                        if (await http.get("/readyz")).status_code == 200:
                            break
                    except httpx2.TransportError:
                        pass
                    await asyncio.sleep(0.1)
        yield process
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)


async def polled(http: httpx2.AsyncClient, url: str) -> dict:
    async with asyncio.timeout(60):
        while True:
            answer = (await http.get(url)).json()
            if answer["status"] != "Pending":
                return answer
            await asyncio.sleep(0.05)


async def test_a_killed_gateways_job_gives_the_same_image(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    suite = FakeSuite()
    async with suite.running(), httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        suite.denoiser.step_gate = asyncio.Event()
        async with gateway_process(suite.address, port, tmp_path) as process:
            made = (
                await http.post("/v1/flux-2-klein-4b", json={"prompt": "a ring", "output_format": "png"})
            ).json()
            await until(lambda: suite.denoiser.specs)
            process.kill()
            await asyncio.to_thread(process.wait)
        suite.denoiser.step_gate.set()
        async with gateway_process(suite.address, port, tmp_path) as process:
            answer = await polled(http, made["polling_url"])
            assert answer["status"] == "Ready"
            [seed] = {seed for spec in suite.denoiser.specs for seed in spec.seeds}
            image = (await http.get(answer["result"]["sample"])).content
            assert image == suite.expected_image("a ring", seed)
            # Stopped by SIGTERM, it gives its job back at once.
            suite.denoiser.step_gate.clear()
            begun = len(suite.denoiser.specs)
            await http.post("/v1/flux-2-klein-4b", json={"prompt": "a disc", "seed": 3})
            await until(lambda: len(suite.denoiser.specs) > begun)
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, 60) == 0
        gateway = Gateway(f"sqlite:///{tmp_path}/klein/jobs.sqlite")
        leased = await gateway.queue.claim()
        assert (leased.job.request["seed"], leased.job.attempts, leased.taken_over) == (3, 1, False)
        await gateway.database.close()
    assert os.stat(tmp_path / "klein" / "jobs.sqlite.secret").st_mode & 0o077 == 0
