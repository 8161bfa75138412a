"""Watch of a suite's processes: their metrics pages, read on demand and at most once a second."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from klein_services.runtime.scrape import Change, Scrape, TargetsError, resolved_targets, scrape_all
from klein_services.runtime.suite_load import ProcessLoad, SuiteLoad, suite_load

SETTING = "KLEIN_METRICS_TARGETS"
INTERVAL_SECONDS = 1.0
"""Shortest time between two readings, however many views there are."""
PROCESS_WINDOW_SECONDS = 10.0
"""Time that the numbers of a process are of."""
TOTALS_WINDOW_SECONDS = 60.0
"""Time that the totals are of: long enough for quantiles of a quiet suite."""
_MAXIMUM_READINGS = 64


@dataclass(frozen=True)
class CacheLoad:
    """A kind of cache of all processes of a stage, since their start."""

    process: str
    kind: str
    hits: float
    lookups: float
    bytes: float | None
    evictions: float


@dataclass(frozen=True)
class SuiteView:
    """Load of a suite, and its caches."""

    totals: SuiteLoad
    """Of the last `TOTALS_WINDOW_SECONDS`."""
    processes: tuple[ProcessLoad, ...]
    """Of the last `PROCESS_WINDOW_SECONDS`; means of steps and waits of the longer window."""
    caches: tuple[CacheLoad, ...]
    problem: str = ""
    """Why no page could be read; empty when there are pages."""


class SuiteWatch:
    """Readings of the last minute. It has no task of its own: without a view it costs nothing.

    Args:
        targets: addresses of metrics pages; `dns:///NAME:PORT` is every address of a name.
    """

    def __init__(self, targets: Sequence[str]) -> None:
        self._targets = tuple(targets)
        self._readings: deque[tuple[float, dict[str, Scrape]]] = deque(maxlen=_MAXIMUM_READINGS)
        self._reading = asyncio.Lock()
        self._problem = ""

    async def view(self) -> SuiteView:
        """Returns the load; reads the pages unless that was done within `INTERVAL_SECONDS`."""
        async with self._reading:
            if not self._readings or time.monotonic() - self._readings[-1][0] >= INTERVAL_SECONDS:
                await self._read()
        if not self._readings:
            return SuiteView(suite_load([]), (), (), self._problem)
        newest = self._readings[-1][1]
        totals = suite_load(self._changes(TOTALS_WINDOW_SECONDS))
        now = suite_load(self._changes(PROCESS_WINDOW_SECONDS))
        # Means of what may not happen for seconds are of the longer window.
        processes = [
            replace(each, step_seconds=other.step_seconds, queue_wait_seconds=other.queue_wait_seconds)
            for each, other in zip(now.processes, totals.processes, strict=True)
        ]
        return SuiteView(
            totals=totals,
            processes=tuple(processes),
            caches=tuple(cache_loads(list(newest.values()))),
            problem=self._problem,
        )

    async def _read(self) -> None:
        if not self._targets:
            self._problem = f"{SETTING} names no metrics pages."
            return
        try:
            addresses = await asyncio.to_thread(resolved_targets, self._targets, SETTING)
            pages = await asyncio.to_thread(scrape_all, addresses)
        except TargetsError as error:
            self._problem = str(error)
            return
        self._problem = ""
        now = time.monotonic()
        self._readings.append((now, {page.target: page for page in pages}))
        while now - self._readings[0][0] > TOTALS_WINDOW_SECONDS and len(self._readings) > 2:
            self._readings.popleft()

    def _changes(self, window_seconds: float) -> list[Change]:
        """Returns the changes of each process since its oldest good page within the window."""
        at, newest = self._readings[-1]
        changes = []
        for target, page in newest.items():
            pages = [
                pages[target]
                for then, pages in self._readings
                if at - then <= window_seconds and target in pages and not pages[target].problem
            ]
            changes.append(Change(pages[0] if pages else page, page))
        return changes


def cache_loads(pages: Sequence[Scrape]) -> list[CacheLoad]:
    """Returns the caches of all processes, replicas of a stage together, sorted by process and kind."""
    found: dict[tuple[str, str], CacheLoad] = {}
    for page in pages:
        process = next((labels["stage"] for labels, _ in page.series("klein_serving")), "")
        kinds = {labels["kind"] for labels, _ in page.series("klein_cache_requests_total")}
        for kind in kinds:
            before = found.get((process, kind), CacheLoad(process, kind, 0, 0, None, 0))
            held = page.value("klein_cache_bytes", kind=kind)
            found[process, kind] = CacheLoad(
                process,
                kind,
                before.hits + (page.value("klein_cache_requests_total", kind=kind, outcome="hit") or 0),
                before.lookups + (page.value("klein_cache_requests_total", kind=kind) or 0),
                before.bytes if held is None else (before.bytes or 0) + held,
                before.evictions + (page.value("klein_cache_evictions_total", kind=kind) or 0),
            )
    return [found[key] for key in sorted(found)]
