"""The scheduling benchmark in a short form: its limits hold, and its traces are those that it documents."""

from __future__ import annotations

import pytest

from benchmarks.scheduling import (
    BURST_REQUESTS,
    BURST_UTILIZATION,
    BUSY,
    OVERLOADED,
    POLICIES,
    bars,
    compare,
    table,
)
from benchmarks.scheduling_device import image_tokens, step_seconds, token_budget
from benchmarks.scheduling_policies import fifo
from benchmarks.scheduling_traces import BURSTS, Arrival, bursts, poisson, read, write
from klein_services.runtime.urgency import Urgency


@pytest.mark.parametrize("name", ["busy", "overloaded", "bursts"])
def test_the_limits_hold(name):
    arrivals = {
        "busy": lambda: poisson(120, BUSY, 0),
        "overloaded": lambda: poisson(120, OVERLOADED, 1),
        "bursts": lambda: read(BURSTS)[:120],
    }[name]()
    results = compare(name, arrivals)
    limits = bars(results, is_estimate_bound=name == "busy")
    assert all(limit.holds for limit in limits), "\n".join(map(str, limits))
    assert len(limits) >= 2
    assert table(list(results.values())).count("\n") == 1 + len(POLICIES)


def test_the_file_of_bursts_is_what_its_process_makes(tmp_path):
    arrivals = bursts(BURST_REQUESTS, BURST_UTILIZATION, 0)
    assert read(BURSTS) == arrivals
    write(arrivals, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == BURSTS.read_text()


def test_fifo_serves_one_after_the_other_or_alike_ones_together():
    def arrival(at: float, side_px: int = 512) -> Arrival:
        return Arrival(at_seconds=at, side_px=side_px, steps=4, urgency=Urgency.STANDARD, caller="a")

    arrivals = [arrival(0.0, 1024), arrival(0.01), arrival(0.02, 256), arrival(0.03)]
    alone = [each.alone_seconds for each in arrivals]
    ends = [each.ended_seconds for each in fifo(arrivals, has_deadlines=False, packs=False)]
    assert ends[-1] == pytest.approx(sum(alone), rel=0.1)
    assert ends == sorted(ends)
    packed = fifo(arrivals, has_deadlines=False, packs=True)
    assert [each.arrival for each in packed] == [arrivals[0], arrivals[1], arrivals[3], arrivals[2]]
    assert packed[1].ended_seconds == packed[2].ended_seconds
    assert token_budget() >= 2 * image_tokens(512)
    assert step_seconds([image_tokens(1024)]) == pytest.approx(0.057, abs=0.001)
