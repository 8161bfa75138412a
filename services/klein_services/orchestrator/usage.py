"""Usage of the public API: metrics for each tenant, and a log of one JSON line a request, from which bills are made."""

from __future__ import annotations

import json
import logging
import os
import stat
import sys
import threading
from collections import deque
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from klein_services.orchestrator.quotas import Charge
from klein_services.orchestrator.tokens import Tenant
from klein_services.runtime.caller import Caller
from klein_services.runtime.logs import RareWarning, request_id
from klein_services.runtime.metrics import (
    OUTCOMES,
    USAGE_IMAGES,
    USAGE_LINES,
    USAGE_LINES_WAITING,
    USAGE_MEGAPIXELS,
    USAGE_REQUESTS,
)
from klein_services.runtime.settings import SettingsError

STANDARD_OUTPUT = "-"
"""The path that means standard output; logs go to standard error."""
QUEUE_LINES = 10_000
"""Most lines that wait for a disk, about 4 MB; further ones are lost and counted."""
RETRY_SECONDS = 1.0
CLOSE_SECONDS = 5.0
DIRECTIONS = ("input", "output")
_log = logging.getLogger("klein.usage")


@dataclass
class RequestUsage:
    """One request's use of the suite, filled in while it runs."""

    model: str
    flow: str
    reference_count: int
    step_count: int = 0
    """Steps of each image; 0 until the request is valid."""
    image_count: int = 0
    """Images that were delivered."""
    input_megapixels: float = 0.0
    """Of the initial image and the references, as the model saw them."""
    output_megapixels: float = 0.0
    """Of the images that were delivered."""
    asked_megapixels: float = 0.0
    """Input and output that the stages were asked for so far, delivered or not."""
    charge: Charge | None = None
    """Taken from the tenant's quota; `None` until the request is admitted."""

    def settle(self, outcome: str) -> None:
        """Charges the quota: what was asked of the stages, or nothing when the request failed or was refused."""
        if self.charge is not None:
            is_charged = outcome in ("succeeded", "cancelled", "expired")
            self.charge.settle(self.asked_megapixels if is_charged else 0.0)


class Usage:
    """Counters of all tenants, and the usage log if there is one."""

    def __init__(self, log: UsageLog | None = None) -> None:
        self.log = log
        self._names: frozenset[str] = frozenset()

    def set_tenants(self, names: Collection[str]) -> None:
        """Makes the label sets of these tenants, and removes those of others."""
        for name in self._names - frozenset(names):
            for outcome in OUTCOMES:
                USAGE_REQUESTS.remove(name, outcome)
            for direction in DIRECTIONS:
                USAGE_MEGAPIXELS.remove(name, direction)
            USAGE_IMAGES.remove(name)
        self._names = frozenset(names)
        for name in names:
            for outcome in OUTCOMES:
                USAGE_REQUESTS.labels(name, outcome)
            for direction in DIRECTIONS:
                USAGE_MEGAPIXELS.labels(name, direction)
            USAGE_IMAGES.labels(name)

    def record(self, caller: Caller, usage: RequestUsage, outcome: str, seconds: float) -> None:
        """Counts a request that has ended, and logs its line. Never waits."""
        if isinstance(caller, Tenant) and caller.name in self._names:
            USAGE_REQUESTS.labels(caller.name, outcome).inc()
            USAGE_IMAGES.labels(caller.name).inc(usage.image_count)
            USAGE_MEGAPIXELS.labels(caller.name, "input").inc(usage.input_megapixels)
            USAGE_MEGAPIXELS.labels(caller.name, "output").inc(usage.output_megapixels)
        if self.log is not None:
            self.log.add(
                {
                    "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    "request_id": request_id.get(),
                    "caller": caller.name,
                    "model": usage.model,
                    "flow": usage.flow,
                    "outcome": outcome,
                    "images": usage.image_count,
                    "input_megapixels": round(usage.input_megapixels, 6),
                    "output_megapixels": round(usage.output_megapixels, 6),
                    "steps": usage.step_count,
                    "seconds": round(seconds, 3),
                    "references": usage.reference_count,
                }
            )


class UsageLog:
    """File of JSON lines, written by a thread of its own, each line at once and whole.

    A process that is killed loses the lines that wait: none or one, unless the disk is slow or full. Then lines wait,
    are written when it works again, and only those beyond `line_limit` are lost. A line that was cut off, by a kill or
    a full disk, ends at the next line break and is written again if its process still runs. A file that was moved away
    is replaced by a new one.

    Args:
        path: the file, which is appended to; `-` is standard output.
        line_limit: most lines that wait.

    Raises:
        SettingsError: the file cannot be opened.
    """

    def __init__(self, path: str, line_limit: int = QUEUE_LINES) -> None:
        self._path = path
        self._line_limit = line_limit
        self._lines: deque[bytes] = deque()
        self._changed = threading.Condition()
        """Guards `_lines`."""
        self._closing = threading.Event()
        self._is_torn = False
        """Whether the file ends within a line."""
        self._failing = RareWarning(_log, "the usage log cannot be written; its lines wait")
        self._losing = RareWarning(_log, "lines of the usage log are lost: too many wait for the disk")
        for outcome in ("written", "lost"):
            USAGE_LINES.labels(outcome)
        try:
            self._file = self._opened()
        except OSError as error:
            raise SettingsError(
                f"KLEIN_USAGE_LOG is {path!r}; it cannot be opened: {error.strerror}"
            ) from None
        # A daemon, so that a disk that hangs cannot keep the process from its end.
        self._thread = threading.Thread(target=self._write_all, name="usage-log", daemon=True)
        self._thread.start()

    def add(self, line: Mapping[str, object]) -> None:
        """Adds a line; never waits for the disk."""
        with self._changed:
            if len(self._lines) < self._line_limit:
                self._lines.append(json.dumps(line).encode() + b"\n")
                self._changed.notify()
                return
        USAGE_LINES.labels("lost").inc()
        self._losing.occurred()

    def close(self) -> None:
        """Writes the lines that wait, for some seconds at most, and closes the file."""
        self._closing.set()
        with self._changed:
            self._changed.notify()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            _log.error("the usage log hangs; lines are lost", extra={"count": len(self._lines) + 1})

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._closing.is_set())
                if not self._lines:
                    break
                line = self._lines[0]
                USAGE_LINES_WAITING.set(len(self._lines))
            while not (is_written := self._write(line)):
                # While the server stops, each line has one attempt.
                if self._closing.wait(RETRY_SECONDS):
                    break
            USAGE_LINES.labels("written" if is_written else "lost").inc()
            with self._changed:
                self._lines.popleft()
                USAGE_LINES_WAITING.set(len(self._lines))
        if self._path != STANDARD_OUTPUT:
            os.close(self._file)

    def _write(self, line: bytes) -> bool:
        """Writes a line, and has the disk keep it when no other waits; returns whether it could."""
        try:
            self._reopen_if_moved()
            rest = memoryview(b"\n" + line if self._is_torn else line)
            while rest:
                rest = rest[os.write(self._file, rest) :]
                self._is_torn = bool(rest)
            if len(self._lines) == 1 and stat.S_ISREG(os.fstat(self._file).st_mode):
                os.fdatasync(self._file)
        except OSError as error:
            self._failing.occurred(path=self._path, error=error.strerror)
            return False
        return True

    def _reopen_if_moved(self) -> None:
        if self._path == STANDARD_OUTPUT:
            return
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self._path), os.fstat(self._file)):
                return
        moved, self._file = self._file, self._opened()
        os.close(moved)

    def _opened(self) -> int:
        if self._path == STANDARD_OUTPUT:
            return sys.stdout.fileno()
        file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        size = os.fstat(file).st_size
        self._is_torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        return file
