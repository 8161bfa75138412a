"""The serving benchmark in short: a real orchestrator before fake stages, and one process with a whole pipeline."""

from __future__ import annotations

import asyncio
import itertools
import json

from benchmarks.serve import main, merged
from benchmarks.serve_record import OUTCOMES, Answer, Record, table
from benchmarks.serve_targets import Use, monoliths
from benchmarks.serve_trace import MIXED, UNIFORM, poisson, requests
from tests.services.fakes.orchestrator_suite import FakeSuite


async def test_a_running_suite_is_measured_and_every_request_is_accounted_for(tmp_path, capsys):
    numbers, picture = tmp_path / "serve.json", tmp_path / "serve.png"
    async with FakeSuite().running() as suite:
        # Fake stages cannot read the pictures of the mixed trace.
        load = ["--mix", "uniform", "--rates", "20", "--clients", "2", "--seconds", "1", "--repeats", "2"]
        options = ["--target", suite.address, *load]
        exit_code = await asyncio.to_thread(
            main, [*options, "--json", str(numbers), "--plot", str(picture), "--check"]
        )
    assert exit_code == 0
    opened, closed = json.loads(numbers.read_text())
    assert (opened["load"], closed["load"]) == ("20/s", "2 clients")
    arrivals = sum(len(poisson(UNIFORM, 20, 1, seed)) for seed in range(2))
    assert sum(opened["outcomes"].values()) == len(opened["answers"]) == arrivals
    assert opened["outcomes"]["succeeded"] > 0
    assert opened["seconds"] >= 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "| 20/s | running |" in capsys.readouterr().out


async def test_a_pipeline_behind_a_queue_answers_and_drops_what_is_late():
    kinds = {arrival.kind: arrival for arrival in itertools.islice(requests(MIXED, 0), 40)}
    assert set(kinds) == set(MIXED)
    async with monoliths("monolith", 1) as target:
        slow = asyncio.create_task(target.ask(kinds[MIXED[2]], 120))
        assert await target.ask(kinds[MIXED[0]], 0.001) == "expired"
        assert await slow == "succeeded"
        assert await target.ask(kinds[MIXED[4]], 120) == "succeeded"
        use = (await target.used())["pipeline"]
    assert use.replica_count == 1
    assert use.busy_seconds > 0
    assert use.cpu_seconds > 0


def test_a_trace_is_the_same_for_every_contender():
    first, second = (poisson(MIXED, 10, 5, 7) for _ in range(2))
    assert first == second != poisson(MIXED, 10, 5, 8)
    assert len({arrival.prompt for arrival in first}) == len(first)
    assert [arrival.at_seconds for arrival in first] == sorted(arrival.at_seconds for arrival in first)
    assert 400 < len(poisson(UNIFORM, 100, 5, 0)) < 600


def test_records_of_repeats_are_added_up_and_late_answers_do_not_count():
    def record(load, outcomes, seconds):
        answers = [Answer("a", "interactive", 0.0, 1.0 + n, outcome) for n, outcome in enumerate(outcomes)]
        return Record("suite", load, seconds, answers, {"denoiser": Use(2, seconds, seconds / 2)})

    [first, second] = merged(
        [record("4/s", OUTCOMES, 4.0), record("8/s", OUTCOMES[:1], 2.0), record("4/s", OUTCOMES[:1], 4.0)]
    )
    assert (first.load, first.seconds, first.goodput, second.load) == ("4/s", 8.0, 0.25, "8/s")
    assert first.use["denoiser"] == Use(2, 8.0, 4.0)
    assert (first.latency(0.95), first.cpu_seconds_per_image) == (1.0, 2.0)
    assert first.within("interactive") == 0.4
    lines = table([first, second]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "2 / 1 / 1 / 1" in lines[2]
    assert "denoiser 50%" in lines[2]
    assert first.summary()["latency_seconds"]["all"]["p99"] == 1.0
    assert Record("none", "0/s", 1.0, []).summary()["latency_seconds"] == {
        "all": {"p50": None, "p95": None, "p99": None}
    }
