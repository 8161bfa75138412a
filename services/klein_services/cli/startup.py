"""Start of a suite in a terminal: progress, followed logs, stop signals."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import FrameType, TracebackType

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from klein_services.cli.probes import StartupPhase
from klein_services.cli.process import PROCESSES
from klein_services.cli.suite import Suite

_COLORS = dict(zip(PROCESSES, ("cyan", "magenta", "green", "yellow", "blue"), strict=True))
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def wait_with_progress(
    suite: Suite,
    console: Console,
    *,
    cancelled: Callable[[], bool] = lambda: False,
    on_poll: Callable[[], None] = lambda: None,
) -> float | None:
    """Waits until the suite is ready and shows the phase of each process.

    Args:
        suite: the suite, started.
        console: where the progress goes: live lines on a terminal, else one line per process.
        cancelled: called at each poll; true ends the wait.
        on_poll: called at each poll.

    Returns:
        Seconds that it took, or `None` when `cancelled` returned true first.

    Raises:
        ProcessDied: a process ended instead.
        CliError: it takes too long.
    """
    progress = LoadingProgress(suite.processes)

    def show(phases: Mapping[str, StartupPhase]) -> None:
        for process in progress.update(phases):
            if not console.is_terminal:
                console.print(f"{process} ready after {progress.seconds:.1f} s", highlight=False)
        on_poll()

    with progress.live(console) if console.is_terminal else nullcontext():
        is_ready = suite.wait_until_ready(on_change=show, cancelled=cancelled)
    return progress.seconds if is_ready else None


class LoadingProgress:
    """Live display with a line per process: a spinner, then the time at which it was ready."""

    def __init__(self, processes: Sequence[str]) -> None:
        self._started = time.monotonic()
        self._phases: Mapping[str, StartupPhase] = dict.fromkeys(processes, StartupPhase.STARTING)
        self._ready_after: dict[str, float] = {}
        self._spinner = Spinner("dots")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def live(self, console: Console) -> Live:
        """Returns the display, which refreshes itself inside a `with` block."""
        return Live(console=console, refresh_per_second=10, get_renderable=self.render)

    def update(self, phases: Mapping[str, StartupPhase]) -> list[str]:
        """Stores the new phases; returns the processes that have become ready."""
        self._phases = dict(phases)
        ready = {process for process, phase in phases.items() if phase is StartupPhase.READY}
        new = sorted(ready - self._ready_after.keys())
        self._ready_after |= dict.fromkeys(new, self.seconds)
        return new

    def render(self) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        for process, phase in self._phases.items():
            ready_after = self._ready_after.get(process)
            if ready_after is None:
                grid.add_row(self._spinner, process, phase.value)
            else:
                grid.add_row(Text("✓", "green"), process, f"ready after {ready_after:.1f} s")
        return grid


class FollowedLogs:
    """Prints new lines of the log files; nothing when `console` is `None`."""

    def __init__(self, folder: Path, console: Console | None) -> None:
        self._console = console
        self._files = {process: folder / f"{process}.log" for process in PROCESSES}
        self._offsets = dict.fromkeys(PROCESSES, 0)

    def show_new(self) -> None:
        """Prints the complete lines that were written since the last call."""
        if self._console is None:
            return
        for process, file in self._files.items():
            if not file.exists():
                continue
            with file.open("rb") as log:
                log.seek(self._offsets[process])
                complete, newline, _ = log.read().rpartition(b"\n")
            self._offsets[process] += len(complete) + len(newline)
            name = (f"{process:<13} ", _COLORS[process])
            for line in complete.decode(errors="replace").splitlines():
                self._console.print(Text.assemble(name, line), soft_wrap=True)


class StopSignals:
    """Counts signals to stop this process, inside a `with` block of the main thread."""

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._insisted = threading.Event()

    def __enter__(self) -> StopSignals:
        self._previous = {each: signal.signal(each, self._handle) for each in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each, handler in self._previous.items():
            signal.signal(each, handler)

    @property
    def requested(self) -> bool:
        return self._requested.is_set()

    @property
    def insisted(self) -> bool:
        """Whether a second signal arrived."""
        return self._insisted.is_set()

    def wait(self, seconds: float) -> bool:
        """Waits for the first signal; returns whether it arrived."""
        return self._requested.wait(seconds)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        (self._insisted if self.requested else self._requested).set()
