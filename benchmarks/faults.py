"""Random faults of real replicas and their network under load: what clients notice of them.

    python -m benchmarks.faults [--check] [--count 1000] [--minutes 90] [--seed 0]
    python -m benchmarks.faults --scenario hang [--check]

Runs two replicas of each stage of pico behind one orchestrator, while clients stream requests of all kinds: several
images, references, masked edits, adapters, previews. In each stage, one replica at a time is disturbed; the stages
take turns independently:

- the process is killed, stopped and let go on, drained, or started again with room for a single request (full);
- its link drops all connections, refuses them, delays, is slow, stalls, cuts a connection in the middle of a tensor, or
  flips bits in what is larger than 2 KiB, which is mostly the content of tensors and files.

The scenario `hang` stops one of two replicas of each stage for 70 s instead, one stage after the other, next to an
undisturbed time of the same length.

Every answer is compared with that of the undisturbed suite. Prints the faults by stage and kind, and the requests by
outcome. With `--check` the exit code is 1 unless all bars hold.
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
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measure import Bar, command, describe_machine, finish
from klein_services.cli.process import STAGES
from tests.e2e.fleet import Fleet, Replica, running_fleet
from tests.e2e.links import CLEAR, Condition
from tests.e2e.load import Load, save_adapter, undisturbed

PROCESS_KINDS = ("kill", "stop", "drain", "full")
CONDITIONS = {
    "delay": Condition(delay_seconds=0.3),
    "slow": Condition(bytes_per_second=8_000),
    "stall": Condition(stalls=True),
    "cut": Condition(cuts=True),
    "corrupt": Condition(flip_share=0.3, flip_bytes=2048),
}
LINK_KINDS = ("drop", "refuse", *CONDITIONS)
# Link faults are quick, so that every process fault has a few of them around it.
KINDS = (
    "kill",
    "drop",
    "delay",
    "stop",
    "cut",
    "corrupt",
    "drain",
    "slow",
    "refuse",
    "stall",
    "corrupt",
    "full",
)
PAUSE_SECONDS = (0.1, 0.5)
STOPPED_SECONDS = (1.0, 9.0)
DISTURBED_SECONDS = (0.5, 4.0)
CUT_SECONDS = 10.0
HANG_SECONDS = 70.0
REPORT_EVERY = 50


@dataclass
class Run:
    """One run: its fleet, its load, and the faults so far."""

    fleet: Fleet
    load: Load
    count: int
    seconds: float
    seed: int
    caused: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Faults by stage and kind."""
    troubles: list[str] = field(default_factory=list)
    """Processes that ended, did not drain or did not come back."""
    flipped: int = 0
    begun: float = field(default_factory=time.monotonic)

    async def disturb(self) -> None:
        """Causes the faults while clients ask."""
        left: Iterator[int] = iter(range(self.count))
        running = asyncio.create_task(self.load.run())
        try:
            await asyncio.gather(*(self._disturb_stage(stage, left) for stage in STAGES))
            if self.fleet.orchestrator.child.exit_code is None:
                await self.load.answer_more()
        finally:
            self.load.stopped.set()
            await running

    async def _disturb_stage(self, stage: str, left: Iterator[int]) -> None:
        randomness = random.Random(f"{self.seed} {stage}")
        for number in left:
            if time.monotonic() > self.begun + self.seconds:
                return
            if (code := self.fleet.orchestrator.child.exit_code) is not None:
                self.troubles.append(f"the orchestrator ended with {code}")
                return
            kind = KINDS[number % len(KINDS)]
            failed = sum(self.load.lost.values()) + sum(self.load.wrong.values())
            replica = randomness.choice(self.fleet.replicas[stage])
            try:
                await self._cause(replica, kind, randomness)
            except AssertionError as error:
                self.troubles.append(f"{stage}, {kind}: {error}")
                await self._replace(replica)
            self.caused[stage, kind] += 1
            if failed != sum(self.load.lost.values()) + sum(self.load.wrong.values()):
                print(
                    f"{self._clock()} {kind} of {stage}, or another fault meanwhile: {self.load.failures[-1]}"
                )
            if self.caused.total() % REPORT_EVERY == 0:
                print(
                    f"{self._clock()} {self.caused.total()} faults, {self.load.answered} answers", flush=True
                )
            await asyncio.sleep(randomness.uniform(*PAUSE_SECONDS))

    async def _cause(self, replica: Replica, kind: str, randomness: random.Random) -> None:
        """Causes a fault and waits until the replica serves again."""
        if kind in LINK_KINDS:
            await self._disturb_link(replica, kind, randomness)
        elif kind == "stop":
            replica.stop()
            await asyncio.sleep(randomness.uniform(*STOPPED_SECONDS))
            replica.go_on()
        elif kind == "kill":
            await asyncio.to_thread(replica.kill)
            await asyncio.sleep(randomness.uniform(*PAUSE_SECONDS))
            await self._replace(replica)
        else:
            await self._drain(replica)
            await self._replace(replica, **({"KLEIN_QUEUE_LIMIT": "1"} if kind == "full" else {}))
            if kind == "full":
                await asyncio.sleep(randomness.uniform(*DISTURBED_SECONDS))
                await self._drain(replica)
                await self._replace(replica)

    async def _drain(self, replica: Replica) -> None:
        if not await asyncio.to_thread(replica.drain):
            self.troubles.append(f"{replica.stage} at {replica.address} did not drain")
            await asyncio.to_thread(replica.kill)

    async def _replace(self, replica: Replica, **settings: str) -> None:
        """Starts a replica in place of one that has ended, or is broken."""
        await asyncio.to_thread(replica.kill)
        replica.start(**settings)
        await asyncio.to_thread(replica.wait_until_serving)

    async def _disturb_link(self, replica: Replica, kind: str, randomness: random.Random) -> None:
        link, network = replica.link, self.fleet.network
        assert link is not None
        seconds = randomness.uniform(*DISTURBED_SECONDS)
        if kind == "drop":
            network.drop(link)
        elif kind == "refuse":
            network.refuse(link)
            await asyncio.sleep(seconds)
            network.accept(link)
        else:
            cut, flipped = link.cut, link.flipped
            link.condition = CONDITIONS[kind]
            end = time.monotonic() + (CUT_SECONDS if kind == "cut" else seconds)
            while time.monotonic() < end and link.cut == cut:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            link.condition = CLEAR
            self.flipped += link.flipped - flipped

    def _clock(self) -> str:
        return f"{time.monotonic() - self.begun:6.0f} s"


async def measured(fleet: Fleet, count: int, seconds: float, seed: int) -> Run:
    """Returns the run after its faults."""
    run = Run(fleet, Load(fleet.target, await undisturbed(fleet.target)), count, seconds, seed)
    await run.disturb()
    return run


async def hang(fleet: Fleet) -> list[Bar]:
    """Stops a replica of each stage for a time; prints and returns what clients noticed."""
    expected = await undisturbed(fleet.target)
    lost, longest, gap = 0, 0.0, 0.0
    print(f"{'stopped':14}{'answered':>10}{'lost':>6}{'longest s':>11}{'gap s':>8}")
    for stage in ("none", *STAGES):
        load = Load(fleet.target, expected)
        running = asyncio.create_task(load.run())
        await load.answer_more()
        replica = fleet.replicas[stage][0] if stage in STAGES else None
        if replica is not None:
            replica.stop()
        await asyncio.sleep(HANG_SECONDS)
        if replica is not None:
            replica.go_on()
        load.stopped.set()
        await running
        failures = sum(load.lost.values()) + sum(load.wrong.values())
        print(
            f"{stage:14}{load.answered:10}{failures:6}{load.longest_seconds:11.1f}{load.longest_gap_seconds:8.1f}",
            flush=True,
        )
        lost += failures
        if replica is not None:
            longest, gap = max(longest, load.longest_seconds), max(gap, load.longest_gap_seconds)
    return [
        Bar("requests lost or with other bytes", lost, 0),
        Bar("longest wait of a client in s", longest, 12),
        Bar("longest time without an answer in s", gap, 5),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bar is missed")
    parser.add_argument("--count", type=int, default=1000, help="faults in all")
    parser.add_argument("--minutes", type=float, default=90.0, help="no fault begins after that time")
    parser.add_argument("--scenario", choices=("random", "hang"), default="random", help="what happens")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of faults")
    arguments = parser.parse_args()
    print(f"{command()}\n{describe_machine('torch', 'grpcio')}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "KLEIN_CACHE_BYTES": "0",  # so that every request needs every stage
            "KLEIN_ADAPTERS_FOLDER": str(save_adapter(Path(folder) / "adapters")),
        }
        with running_fleet(
            Path(folder), dict.fromkeys(STAGES, 2), settings=settings, has_links=True
        ) as fleet:
            if arguments.scenario == "hang":
                return finish(asyncio.run(hang(fleet)), arguments.check)
            run = asyncio.run(measured(fleet, arguments.count, arguments.minutes * 60, arguments.seed))
            logs = fleet.logs()
    return finish(report(run, logs), arguments.check)


def report(run: Run, logs: str) -> list[Bar]:
    """Prints what a run has shown, and returns its bars."""
    load = run.load
    kinds = (*PROCESS_KINDS, *LINK_KINDS)
    print(f"{'stage':14}" + "".join(f"{kind:>8}" for kind in kinds))
    for stage in STAGES:
        print(f"{stage:14}" + "".join(f"{run.caused[stage, kind]:8}" for kind in kinds))
    print(
        f"{run.caused.total()} faults, {run.flipped} bits flipped; answered: {load.answered}, longest "
        f"{load.longest_seconds:.1f} s, longest time without an answer {load.longest_gap_seconds:.1f} s; refused and "
        f"asked again: {load.refused}; {time.monotonic() - run.begun:.0f} s in all"
    )
    for problem, number in [*load.lost.items(), *load.wrong.items()]:
        print(f"  {number} × {problem}")
    for trouble in run.troubles:
        print(f"  {trouble}")
    for line in logs.splitlines():
        if "Traceback" in line:
            print(f"  {line[:2000]}")
    return [
        Bar("requests lost", sum(load.lost.values()), 0),
        Bar("answers with other bytes than undisturbed", sum(load.wrong.values()), 0),
        Bar("processes that ended, did not drain or did not come back", len(run.troubles), 0),
        Bar("tracebacks in logs", logs.count("Traceback"), 0),
    ]


if __name__ == "__main__":
    sys.exit(main())
