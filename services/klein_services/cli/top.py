"""`klein top`: the processes of a suite with their load, live, from their metrics pages."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from klein_services.cli.errors import CliError
from klein_services.cli.output import memory_size
from klein_services.cli.process import ORCHESTRATOR, PROCESSES
from klein_services.cli.scrape import Change, Scrape, quantile, resolved_targets, scrape_all

_PUBLIC_SERVICE = "klein_api.v1.ImageService"
_PUBLIC_METHODS = ("GenerateImage", "StreamGenerateImage")
_DENOISER = "denoiser"
_UNKNOWN = "–"
_PIPE_WIDTH = 160
"""Columns of a table that is not printed on a terminal."""


@dataclass(frozen=True)
class ProcessLoad:
    """One process, as `klein top --json` prints it. A number that is not known is `None`."""

    target: str
    stage: str | None = None
    problem: str = ""
    """Why there is no metrics page; empty when there is one."""
    serving: bool = False
    model: str | None = None
    device: str | None = None
    queued: float | None = None
    running: float | None = None
    """Requests on the device; of an orchestrator, requests in progress."""
    queue_wait_seconds: float | None = None
    """Mean wait of the requests that started within the interval."""
    busy_ratio: float | None = None
    """Share of the interval in which the device computed."""
    requests_per_second: float | None = None
    """Requests that the device finished; of an orchestrator, requests that were answered."""
    step_seconds: float | None = None
    """Mean time of a denoiser's step."""
    step_occupancy_ratio: float | None = None
    """Tokens of the last step divided by the token budget."""
    refused_per_second: float | None = None
    memory_bytes: float | None = None
    """Device memory that torch holds."""


@dataclass(frozen=True)
class SuiteLoad:
    """All processes and the totals of the public API."""

    interval_seconds: float | None
    """Time between the two scrapes that rates are from; `None` after the first."""
    images_per_second: float | None
    megapixels_per_second: float | None
    in_progress: float | None
    median_seconds: float | None
    p95_seconds: float | None
    refused_per_second: dict[str, float] = field(default_factory=dict)
    """Reason → refusals of all processes."""
    cache_hit_ratio: float | None = None
    processes: list[ProcessLoad] = field(default_factory=list)


def process_load(change: Change) -> ProcessLoad:
    """Returns the load of one process."""
    page = change.after
    known = next((found["stage"] for found, _ in change.before.series("klein_serving")), None)
    if page.problem:
        return ProcessLoad(page.target, known, problem=page.problem)
    labels, serving = next(page.series("klein_serving"))
    stage = labels["stage"]
    info = next((found for found, _ in page.series("klein_stage_info")), {})
    if stage == ORCHESTRATOR:
        running = _in_progress(page)
        finished = _known_sum([change.rate("klein_request_duration_seconds_count")])
    else:
        running = page.value("klein_running_requests", stage=stage)
        finished = change.rate("klein_stage_duration_seconds_count", stage=stage)
    # A request of many steps counts only when it ends; its steps count as they are made.
    busy = "klein_denoise_step_seconds_sum" if stage == _DENOISER else "klein_stage_duration_seconds_sum"
    return ProcessLoad(
        target=page.target,
        stage=stage,
        serving=bool(serving),
        model=info.get("model"),
        device=" ".join(filter(None, (info.get("device"), info.get("dtype")))) or None,
        queued=page.value("klein_queue_depth", stage=stage),
        running=running,
        queue_wait_seconds=change.mean("klein_queue_wait_seconds", stage=stage),
        busy_ratio=None if stage == ORCHESTRATOR else change.rate(busy, stage=stage),
        requests_per_second=finished,
        step_seconds=change.mean("klein_denoise_step_seconds"),
        step_occupancy_ratio=page.value("klein_denoise_step_occupancy_ratio"),
        refused_per_second=change.rate("klein_request_rejected_total", stage=stage),
        memory_bytes=page.value("klein_device_memory_bytes", stage=stage, kind="reserved"),
    )


def suite_load(changes: Sequence[Change]) -> SuiteLoad:
    """Returns the load of all processes, the stages in the order of a request's life."""
    processes = sorted(
        map(process_load, changes),
        key=lambda each: PROCESSES.index(each.stage) if each.stage in PROCESSES else len(PROCESSES),
    )
    reasons = {
        found["reason"]
        for change in changes
        for found, _ in change.after.series("klein_request_rejected_total")
    }
    refused = {
        reason: _known_sum([change.rate("klein_request_rejected_total", reason=reason) for change in changes])
        for reason in sorted(reasons)
    }
    hits, looked_up = (
        _known_sum([change.increase("klein_cache_requests_total", **labels) for change in changes])
        for labels in ({"outcome": "hit"}, {})
    )
    pixels = _known_sum([change.rate("klein_pixels_total") for change in changes])
    return SuiteLoad(
        interval_seconds=max((change.seconds for change in changes), default=0.0) or None,
        images_per_second=_known_sum(
            [change.rate("klein_images_total", outcome="succeeded") for change in changes]
        ),
        megapixels_per_second=None if pixels is None else pixels / 1e6,
        in_progress=_known_sum([_in_progress(change.after) for change in changes]),
        median_seconds=quantile(changes, 0.5, "klein_request_duration_seconds", outcome="succeeded"),
        p95_seconds=quantile(changes, 0.95, "klein_request_duration_seconds", outcome="succeeded"),
        refused_per_second={reason: rate for reason, rate in refused.items() if rate},
        cache_hit_ratio=hits / looked_up if looked_up and hits is not None else None,
        processes=processes,
    )


def _in_progress(page: Scrape) -> float | None:
    """Returns the public requests that have begun and not ended; `None` where there is no public API."""
    differences = []
    for method in _PUBLIC_METHODS:
        labels = {"grpc_service": _PUBLIC_SERVICE, "grpc_method": method}
        started = page.value("grpc_server_started_total", **labels)
        handled = page.value("grpc_server_handled_total", **labels)
        if started is not None:
            differences.append(max(0.0, started - (handled or 0.0)))
    return sum(differences) if differences else None


def _known_sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def run_top(
    targets: Sequence[str], interval_seconds: float, console: Console, *, once: bool, as_json: bool
) -> int:
    """Shows the load until Ctrl-C, or once after one interval; returns the exit code.

    Where the output is no terminal, once is the default, and `as_json` prints a line at each interval.

    Raises:
        CliError: no process answers at the start, or a target is malformed.
    """
    addresses = resolved_targets(targets)
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
