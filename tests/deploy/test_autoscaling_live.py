"""The closed loop in short: real replicas, started and stopped by the ScaledObject that asks the orchestrator."""

from __future__ import annotations

import asyncio

from benchmarks.autoscaling import run_mode
from benchmarks.autoscaling_record import Load
from tests.deploy.tools import tool

SPEED = 30.0
"""Divisor of the manifest's periods: rounds of 0.5 s, 10 s until the first replica may go, 2 s between two."""
LOAD = Load(before_seconds=8, peak_seconds=28, after_seconds=32)


def test_a_step_of_load_is_absorbed_and_scale_in_loses_no_request():
    record = asyncio.run(run_mode("external", LOAD, SPEED, tool("dnsmasq"), tool("prometheus")))
    assert record.failures == []
    assert len(record.answers) > LOAD.peak * LOAD.peak_seconds / 2
    assert record.most >= 3
    assert max(count for _, count in record.serving) >= 3
    # One replica would have collected 1.5 s of work each second.
    end = LOAD.before_seconds + LOAD.peak_seconds
    assert min(value for at, value in record.values if end - 10 <= at < end) < record.target * 3
    assert record.desired[-1][1] == 1
    assert record.exit_codes == [0] * len(record.exit_codes)
    assert len(record.exit_codes) >= record.most - 1
