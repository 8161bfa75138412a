"""Random faults of real replicas under load: what clients notice of them.

    python -m benchmarks.faults [--check] [--count 1000] [--seed 0]

Runs two replicas of each stage of pico behind one orchestrator, while clients stream text-to-image requests and edits.
In each stage, one replica at a time is killed and started again, stopped and let go on, or drained and started again,
at random moments; the stages take turns independently. Every answer is compared with that of the undisturbed suite.
Prints the faults by stage and kind, and the requests by outcome. With `--check` the exit code is 1 unless all bars
hold.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Bar, command, describe_machine, finish
from klein_client import AsyncClient
from klein_services.cli.process import STAGES
from tests.e2e.fleet import Fleet, Replica, running_fleet
from tests.e2e.test_faults import CASES, Load, spec, streamed

KINDS = ("kill", "stop", "drain")
PAUSE_SECONDS = (0.2, 2.0)
STOPPED_SECONDS = (1.0, 15.0)
OTHER_BYTES = "other bytes than undisturbed"


async def cause(replica: Replica, kind: str, randomness: random.Random) -> None:
    """Causes a fault and waits until the replica serves again."""
    if kind == "stop":
        replica.stop()
        await asyncio.sleep(randomness.uniform(*STOPPED_SECONDS))
        replica.go_on()
        return
    if kind == "kill":
        await asyncio.to_thread(replica.kill)
    elif not await asyncio.to_thread(replica.drain):
        raise RuntimeError(f"{replica.stage} at {replica.address} did not drain")
    await asyncio.sleep(randomness.uniform(*PAUSE_SECONDS))
    replica.start()
    await asyncio.to_thread(replica.wait_until_serving)


async def disturb(fleet: Fleet, load: Load, count: int, seed: int) -> Counter[tuple[str, str]]:
    """Causes so many faults in all; returns their number by stage and kind."""
    caused: Counter[tuple[str, str]] = Counter()
    left: Iterator[int] = iter(range(count))

    async def one_stage(stage: str) -> None:
        randomness = random.Random(f"{seed} {stage}")
        for number in left:
            kind = KINDS[number % len(KINDS)]
            await cause(randomness.choice(fleet.replicas[stage]), kind, randomness)
            caused[stage, kind] += 1
            await asyncio.sleep(randomness.uniform(*PAUSE_SECONDS))

    running = asyncio.create_task(load.run())
    try:
        await asyncio.gather(*(one_stage(stage) for stage in STAGES))
        await load.answer_more()
    finally:
        load.stopped.set()
        await running
    return caused


async def measured(fleet: Fleet, count: int, seed: int) -> tuple[Load, Counter[tuple[str, str]]]:
    """Returns the load after the faults, and the faults."""
    async with AsyncClient(fleet.target) as client:
        expected = {case: await streamed(client.stub(), spec(case)) for case in range(CASES)}
    load = Load(fleet.target, expected)
    return load, await disturb(fleet, load, count, seed)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bar is missed")
    parser.add_argument("--count", type=int, default=1000, help="faults in all")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of faults")
    arguments = parser.parse_args()
    print(f"{command()}\n{describe_machine('torch', 'grpcio')}")
    begun = time.monotonic()
    settings = {"KLEIN_CACHE_BYTES": "0"}  # so that every request needs every stage
    with (
        tempfile.TemporaryDirectory() as folder,
        running_fleet(Path(folder), dict.fromkeys(STAGES, 2), settings=settings) as fleet,
    ):
        load, caused = asyncio.run(measured(fleet, arguments.count, arguments.seed))
        tracebacks = fleet.logs().count("Traceback")
    print(f"{'stage':14}" + "".join(f"{kind:>8}" for kind in KINDS))
    for stage in STAGES:
        print(f"{stage:14}" + "".join(f"{caused[stage, kind]:8}" for kind in KINDS))
    outcomes = Counter(failure.split(":")[0] for failure in load.failures if OTHER_BYTES not in failure)
    wrong = sum(OTHER_BYTES in failure for failure in load.failures)
    print(f"answered: {load.answered}, longest {load.longest_seconds:.1f} s; lost: {dict(outcomes)}")
    for failure in sorted(set(load.failures)):
        print(f"  {failure}")
    print(f"{time.monotonic() - begun:.0f} s in all")
    bars = [
        Bar("requests lost", sum(outcomes.values()), 0),
        Bar("answers with other bytes than undisturbed", wrong, 0),
        Bar("tracebacks in logs", tracebacks, 0),
    ]
    return finish(bars, arguments.check)


if __name__ == "__main__":
    sys.exit(main())
