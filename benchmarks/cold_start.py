"""Time in which a second replica of a stage takes work, and the phases of its start.

A suite of pico makes images for several clients at once; the orchestrator knows the address of a replica that does not
run yet. The clock runs from the start of that replica's process to the first request that it has finished.

    python -m benchmarks.cold_start --check
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.measure import Bar, command, describe_machine, finish
from klein_client import AsyncClient
from klein_services.cli.ports import LOOPBACK, ReservedPort
from klein_services.cli.process import STAGES, inherited_environment
from klein_services.cli.suite import Suite, SuiteOptions
from klein_services.runtime.scrape import Scrape, scrape

BAR_SECONDS = 15.0
CLIENTS = 4
POLL_SECONDS = 0.05
GIVE_UP_SECONDS = 300.0


async def replica_start(suite: Suite, stage: str, port: int, metrics_port: int) -> tuple[float, Scrape]:
    """Starts a second replica under load; returns the seconds to its first finished request, and its page then."""
    done = asyncio.Event()

    async def client(number: int) -> None:
        async with AsyncClient(suite.target, timeout_seconds=GIVE_UP_SECONDS, retry=False) as caller:
            for index in range(10**6):
                if done.is_set():
                    return
                # Another prompt each time, so that no cache answers it.
                await caller.generate(f"a red circle {number} {index}", seed=index)

    environment = inherited_environment() | {
        "KLEIN_HOST": LOOPBACK,
        "KLEIN_PORT": str(port),
        "KLEIN_METRICS_PORT": str(metrics_port),
        "KLEIN_MODEL_NAME": suite.model_name,
        "KLEIN_DRAIN_DELAY_SECONDS": "0",
        "KLEIN_THREADS": "1",
    }
    module = f"klein_services.{stage.replace('-', '_')}"
    log = suite.log_folder / f"{stage}-2.log"
    clients = [asyncio.create_task(client(number)) for number in range(CLIENTS)]
    begin = time.monotonic()
    with log.open("wb") as output:
        replica = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, env=environment, stderr=output
        )
    try:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            page = await asyncio.to_thread(scrape, f"{LOOPBACK}:{metrics_port}")
            if page.value("klein_stage_duration_seconds_count", stage=stage):
                return time.monotonic() - begin, page
            if replica.returncode is not None or time.monotonic() - begin > GIVE_UP_SECONDS:
                raise RuntimeError(f"the second {stage} took no work; its log is {log}")
    finally:
        done.set()
        await asyncio.gather(*clients, return_exceptions=True)
        if replica.returncode is None:
            replica.terminate()
        await replica.wait()


def measure(stage: str) -> Bar:
    """Measures one stage and prints its phases."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ReservedPort() as spare,
        ReservedPort() as metrics,
    ):
        suite = Suite(SuiteOptions(device="cpu", threads=1, log_folder=Path(folder)))
        both = f"ipv4:{LOOPBACK}:{suite.ports[stage]},{LOOPBACK}:{spare.port}"
        targets = {f"KLEIN_{stage.replace('-', '_').upper()}_TARGET": both}
        suite.options = replace(suite.options, settings=targets)
        with suite:
            suite.wait_until_ready(timeout_seconds=GIVE_UP_SECONDS)
            seconds, page = asyncio.run(replica_start(suite, stage, spare.port, metrics.port))
        phases = {found["phase"]: value for found, value in page.series("klein_model_load_seconds")}
        total, cpu = sum(phases.values()), page.value("process_cpu_seconds_total") or 0.0
        shares = ", ".join(f"{name} {value:.2f} s ({value / total:.0%})" for name, value in phases.items())
        print(f"{stage}: first request after {seconds:.2f} s; start {total:.2f} s: {shares}; CPU {cpu:.2f} s")
        return Bar(f"{stage}: seconds from one to two replicas that take work", seconds, BAR_SECONDS)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cold_start", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is missed")
    parser.add_argument("--stage", choices=STAGES, help="measure one stage only")
    options = parser.parse_args(arguments)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"$ {command()}\n{describe_machine('torch', 'transformers', 'grpcio')}; load average {load}")
    stages = [options.stage] if options.stage else STAGES
    return finish([measure(stage) for stage in stages], options.check)


if __name__ == "__main__":
    sys.exit(main())
