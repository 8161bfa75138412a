"""Delay of a caller with one request by a caller with many, over real processes with tokens.

    python -m benchmarks.fairness [--check] [--crowd 40] [--requests 30]

Both callers ask for 128² in four steps with the standard priority. The crowd keeps that many requests in the suite;
the other sends one after the other. A denoiser on a CPU steps one image at a time, so each of the other's requests
waits for the rest of one of the crowd's at most, not for all that came before.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

from benchmarks.measure import Bar, describe_machine, finish
from klein_client import AsyncClient
from klein_services.cli.suite import Suite, SuiteOptions
from klein_services.orchestrator.tokens import Tenant, new_token, tenant_table

SIDE_PX = 128
LIMIT_REQUESTS = 4.0
"""Times of a request alone that one may take: its own and one of the crowd's in the denoiser, and as much again because
the other stages and the crowd's client take a share of the same two cores."""
_SEEDS = count(1)


async def ask(client: AsyncClient) -> float:
    """Returns the seconds of one request."""
    begin = time.perf_counter()
    await client.generate(
        "a red heart", width=SIDE_PX, height=SIDE_PX, seed=next(_SEEDS), timeout_seconds=300
    )
    return time.perf_counter() - begin


async def crowd(client: AsyncClient, done: list[float]) -> None:
    """Sends one request after the other until it is cancelled."""
    while True:
        done.append(await ask(client))


async def measure(target: str, tokens: dict[str, str], crowd_size: int, requests: int) -> list[Bar]:
    async with (
        AsyncClient(target, token=tokens["crowd"], retry=False) as many,
        AsyncClient(target, token=tokens["single"], retry=False) as one,
    ):
        alone = statistics.median([await ask(one) for _ in range(15)][5:])
        done: list[float] = []
        tasks = [asyncio.create_task(crowd(many, done)) for _ in range(crowd_size)]
        await asyncio.sleep(max(3.0, 4 * alone))
        begun, begun_at = len(done), time.perf_counter()
        delayed = [await ask(one) for _ in range(requests)]
        seconds = time.perf_counter() - begun_at
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        failures = [each for each in ended if not isinstance(each, asyncio.CancelledError)]
        if failures:
            raise AssertionError(
                f"{len(failures)} requests of the crowd failed, the first with {failures[0]!r}"
            )
    during = done[begun:]
    p95 = sorted(delayed)[int(0.95 * (len(delayed) - 1))]
    print(
        f"alone {alone:.3f} s; next to {crowd_size}: median {statistics.median(delayed):.3f} s, p95 {p95:.3f} s; "
        f"the crowd's: median {statistics.median(during):.3f} s; in {seconds:.1f} s "
        f"{requests} and {len(during)} requests"
    )
    return [
        Bar("one next to the crowd, median / alone", statistics.median(delayed) / alone, LIMIT_REQUESTS),
        Bar(
            "the crowd's median / the one's",
            statistics.median(during) / statistics.median(delayed),
            4,
            at_most=False,
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is missed")
    parser.add_argument("--crowd", type=int, default=40, help="requests that one caller has in the suite")
    parser.add_argument("--requests", type=int, default=30, help="requests of the other, one after the other")
    options = parser.parse_args()
    print(describe_machine("torch", "grpcio"))
    tokens = {name: new_token() for name in ("crowd", "single")}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokens.toml"
        tables = [tenant_table(Tenant(name=name), token) for name, token in tokens.items()]
        file.write_text("\n".join(tables), encoding="utf-8")
        suite_options = SuiteOptions(
            model="pico", device="cpu", threads=1, settings={"KLEIN_TOKENS_FILE": str(file)}
        )
        with Suite(suite_options) as suite:
            suite.wait_until_ready(timeout_seconds=300)
            return finish(
                asyncio.run(measure(str(suite.target), tokens, options.crowd, options.requests)),
                options.check,
            )


if __name__ == "__main__":
    sys.exit(main())
