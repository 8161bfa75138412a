"""Serving under mixed load: this suite with and without packing, and whole pipelines behind a queue.

    python -m benchmarks.serve [--rates 4,8,16] [--clients 16] [--seconds 30] [--repeats 2] [--mix mixed|uniform]
                               [--json FILE] [--plot FILE]
    python -m benchmarks.serve --target HOST:PORT [--metrics HOST:PORT]... [--rates 4,8]

Every contender gets the same requests at the same moments, one contender after the other, load by load. Open loop:
requests arrive at random (Poisson) at each rate, whatever becomes of those before. Closed loop: so many clients each
send a request when the one before has ended, those that were refused after a pause. Each request has a deadline by its
class; what comes later does not count. Latencies are from the moment at which a request was due.

Contenders are `exact` (the suite with `KLEIN_PACKING=exact`, the default on a CPU), `packed` and `monolith`: as many
processes with a whole pipeline as the suites have denoisers, behind one queue, without any network. All run pico on
the CPU with one thread a process. `--target` measures a suite that runs already instead.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.measure import Bar, command, describe_machine, finish
from benchmarks.serve_plot import plot
from benchmarks.serve_record import Answer, Record, table
from benchmarks.serve_targets import SuiteTarget, Target, monoliths, own_suite, total_use
from benchmarks.serve_trace import MIXES, Arrival, Kind, poisson, requests

CONTENDERS = ("exact", "packed", "monolith")
DEADLINES = {"interactive": 3.0, "standard": 10.0, "batch": 60.0}
"""Seconds after which an answer is of no use, by class."""
REFUSED_PAUSE_SECONDS = 0.5
WARM_UP_COUNT = 12


async def asked(target: Target, arrival: Arrival, due: float, begun: float) -> Answer:
    """Makes a request that was due at a time, and returns what became of it."""
    deadline = DEADLINES[arrival.kind.urgency]
    outcome = await target.ask(arrival, max(due + deadline - time.monotonic(), 0.001))
    seconds = time.monotonic() - due
    return Answer(arrival.kind.name, arrival.kind.urgency, due - begun, seconds, outcome)


async def open_loop(target: Target, arrivals: Sequence[Arrival]) -> list[Answer]:
    """Sends each request when it is due, and waits for all."""
    begun, tasks = time.monotonic(), []
    for arrival in arrivals:
        due = begun + arrival.at_seconds
        await asyncio.sleep(max(due - time.monotonic(), 0.0))
        tasks.append(asyncio.create_task(asked(target, arrival, due, begun)))
    return list(await asyncio.gather(*tasks))


async def closed_loop(
    target: Target, mix: tuple[Kind, ...], client_count: int, seconds: float, seed: int
) -> list[Answer]:
    """Lets clients send one request after the other for so long, and waits for the last ones."""
    begun, answers, stream = time.monotonic(), list[Answer](), requests(mix, seed)

    async def client() -> None:
        while time.monotonic() < begun + seconds:
            answer = await asked(target, next(stream), time.monotonic(), begun)
            answers.append(answer)
            if answer.outcome == "refused":
                await asyncio.sleep(REFUSED_PAUSE_SECONDS)

    await asyncio.gather(*(client() for _ in range(client_count)))
    return answers


async def measured(
    target: Target, rates: Sequence[float], client_count: int, seconds: float, mix: str, seed: int
) -> list[Record]:
    """Returns a record for each rate, and one of the closed loop where there are clients."""
    kinds = MIXES[mix]
    warm_up = [
        arrival for arrival, _ in zip(requests(kinds, seed + 10**6), range(WARM_UP_COUNT), strict=False)
    ]
    for arrival in warm_up:
        await target.ask(arrival, DEADLINES["batch"])
    records = []
    for rate in rates:
        arrivals = poisson(kinds, rate, seconds, seed)
        await target.used()
        begun = time.monotonic()
        answers = await open_loop(target, arrivals)
        taken = max(time.monotonic() - begun, seconds)
        records.append(Record(target.name, f"{rate:g}/s", taken, answers, await target.used()))
    if client_count:
        await target.used()
        begun = time.monotonic()
        answers = await closed_loop(target, kinds, client_count, seconds, seed)
        taken, load = time.monotonic() - begun, f"{client_count} clients"
        records.append(Record(target.name, load, taken, answers, await target.used()))
    return records


@asynccontextmanager
async def contender(name: str, folder: Path, process_count: int) -> AsyncIterator[Target]:
    """Runs one contender."""
    if name == "monolith":
        async with monoliths(name, process_count) as pipelines:
            yield pipelines
        return
    async with own_suite(name, folder / name, name, process_count) as suite:
        yield suite


async def run(arguments: argparse.Namespace) -> list[Record]:
    """Measures the contenders in turns, so that a slow moment of the machine meets different ones."""
    records: list[Record] = []
    loads = (arguments.rates, arguments.clients, arguments.seconds, arguments.mix)
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(arguments.repeats):
            if arguments.target:
                async with SuiteTarget("running", arguments.target, arguments.metrics).running() as suite:
                    records += await measured(suite, *loads, repeat)
                continue
            order = arguments.contenders if repeat % 2 == 0 else arguments.contenders[::-1]
            for name in order:
                async with contender(name, Path(folder) / str(repeat), arguments.processes) as target:
                    records += await measured(target, *loads, repeat)
    return merged(records)


def merged(records: Sequence[Record]) -> list[Record]:
    """Adds up the records of repeats, in the order of loads."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.load, record.contender), []).append(record)
    loads = list(dict.fromkeys(record.load for record in records))
    return [
        Record(
            name,
            load,
            sum(each.seconds for each in group),
            [answer for each in group for answer in each.answers],
            total_use([each.use for each in group]),
        )
        for (load, name), group in sorted(groups.items(), key=lambda item: loads.index(item[0][0]))
    ]


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 when a request fails")
    parser.add_argument("--rates", type=_numbers, default=[4.0, 8.0, 16.0], help="arrivals a second")
    parser.add_argument("--clients", type=int, default=16, help="clients of the closed loop; 0 is none")
    parser.add_argument("--seconds", type=float, default=30.0, help="length of each load")
    parser.add_argument("--repeats", type=int, default=2, help="rounds of all contenders and loads")
    parser.add_argument("--mix", choices=tuple(MIXES), default="mixed", help="requests of the trace")
    parser.add_argument("--processes", type=int, default=2, help="denoisers of a suite; monoliths")
    parser.add_argument(
        "--contenders", type=lambda text: text.split(","), default=list(CONTENDERS), help="in which order"
    )
    parser.add_argument(
        "--target", default="", help="HOST:PORT of a running orchestrator, instead of contenders"
    )
    parser.add_argument("--metrics", action="append", default=[], help="HOST:PORT of a metrics page of it")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--plot", type=Path, help="file for the picture")
    found = parser.parse_args(arguments)
    if unknown := set(found.contenders) - set(CONTENDERS):
        parser.error(f"--contenders: {', '.join(sorted(unknown))} is none of {', '.join(CONTENDERS)}")
    return found


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",") if number]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table and writes the files."""
    options = parsed(arguments)
    print(f"{command()}\n{describe_machine('torch', 'grpcio')}")
    records = asyncio.run(run(options))
    print(table(records))
    if options.json:
        options.json.write_text(json.dumps([record.summary() for record in records], indent=1) + "\n")
    if options.plot:
        open_records = [record for record in records if record.load.endswith("/s")]
        plot(open_records, [float(record.load.removesuffix("/s")) for record in open_records], options.plot)
    failed = sum(record.counts["failed"] for record in records)
    return finish([Bar("failed requests", failed, 0)], options.check)


if __name__ == "__main__":
    sys.exit(main())
