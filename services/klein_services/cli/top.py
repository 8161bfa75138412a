"""`klein top`: the processes of a suite with their load, live, from their metrics pages."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from klein_services.cli.errors import CliError
from klein_services.cli.exit_codes import MISUSED
from klein_services.cli.output import memory_size
from klein_services.runtime.scrape import (
    DEFAULT_TARGETS,
    Change,
    MalformedTarget,
    Scrape,
    TargetsError,
    resolved_targets,
    scrape_all,
)
from klein_services.runtime.suite_load import SuiteLoad, suite_load

_UNKNOWN = "–"
_PIPE_WIDTH = 160
"""Columns of a table that is not printed on a terminal."""


def run_top(
    targets: Sequence[str], interval_seconds: float, console: Console, *, once: bool, as_json: bool
) -> int:
    """Shows the load until Ctrl-C, or once after one interval; returns the exit code.

    Where the output is no terminal, once is the default, and `as_json` prints a line at each interval.

    Raises:
        CliError: no process answers at the start, or a target is malformed.
    """
    try:
        addresses = resolved_targets(targets, "--metrics")
    except MalformedTarget as error:
        hint = f"Name it as HOST:PORT, for example {DEFAULT_TARGETS[0]}."
        raise CliError(str(error), hint, MISUSED) from error
    except TargetsError as error:
        raise CliError(str(error)) from error
    before = scrape_all(addresses)
    if all(page.problem for page in before):
        found = "\n".join(f"  {page.target}: {page.problem}" for page in before)
        raise CliError(
            f"No metrics page answers.\n{found}",
            "Start the suite with `klein up`, or name the pages with --metrics HOST:PORT.",
        )
    try:
        if as_json or once or not console.is_terminal:
            if not console.is_terminal:
                console.width = _PIPE_WIDTH
            while True:
                time.sleep(interval_seconds)
                after = scrape_all(addresses)
                load = suite_load(_changes(before, after))
                if as_json:
                    console.print(Text(json.dumps(asdict(load))), soft_wrap=True)
                else:
                    console.print(_view(load))
                before = _newest(before, after)
                if once or not as_json:
                    return 0
        with Live(
            _view(suite_load([Change(page, page) for page in before])), console=console, screen=True
        ) as live:
            while True:
                time.sleep(interval_seconds)
                after = scrape_all(addresses)
                live.update(_view(suite_load(_changes(before, after))), refresh=True)
                before = _newest(before, after)
    except KeyboardInterrupt:
        return 0


def _changes(before: Sequence[Scrape], after: Sequence[Scrape]) -> list[Change]:
    return [Change(*pair) for pair in zip(before, after, strict=True)]


def _newest(before: Sequence[Scrape], after: Sequence[Scrape]) -> list[Scrape]:
    """Returns the last good scrape of each process: rates go on from it when a process comes back."""
    return [old if new.problem else new for old, new in zip(before, after, strict=True)]


def _view(load: SuiteLoad) -> Group:
    """Returns the totals and a table with a row for each process."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("STAGE", no_wrap=True)
    table.add_column("HEALTH", no_wrap=True)
    for heading in ("QUEUE", "RUN", "WAIT", "BUSY", "REQ/S", "STEP", "FILL", "REFUSED/S"):
        table.add_column(heading, no_wrap=True, justify="right")
    has_memory = any(each.memory_bytes for each in load.processes)
    if has_memory:
        table.add_column("MEMORY", no_wrap=True, justify="right")
    table.add_column("METRICS", no_wrap=True)
    for each in load.processes:
        health = Text("serving", "green") if each.serving else Text("not ready", "yellow")
        cells = [
            _number(each.queued),
            _number(each.running),
            _seconds(each.queue_wait_seconds),
            _percent(each.busy_ratio),
            _rate(each.requests_per_second),
            _seconds(each.step_seconds),
            _percent(each.step_occupancy_ratio),
            _rate(each.refused_per_second),
        ]
        if has_memory:
            cells.append(_UNKNOWN if each.memory_bytes is None else memory_size(int(each.memory_bytes)))
        health = Text("no answer", "red") if each.problem else health
        table.add_row(each.stage or "?", health, *cells, each.target)
    totals = (
        f"{_rate(load.images_per_second)} images/s  {_rate(load.megapixels_per_second)} MP/s  "
        f"{_number(load.in_progress)} in progress  median {_seconds(load.median_seconds)}  "
        f"p95 {_seconds(load.p95_seconds)}  cache {_percent(load.cache_hit_ratio)}"
    )
    lines = [Text(totals, "bold")]
    if load.refused_per_second:
        refused = ", ".join(f"{reason} {_rate(rate)}" for reason, rate in load.refused_per_second.items())
        lines.append(Text(f"refused per second: {refused}", "red"))
    problems = [Text(f"{each.target}: {each.problem}", "dim") for each in load.processes if each.problem]
    return Group(*lines, Text(), table, *problems)


def _number(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.0f}"


def _rate(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.0%}"


def _seconds(value: float | None) -> str:
    if value is None:
        return _UNKNOWN
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"
