"""What each process is doing while a suite starts."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import FrameType, TracebackType

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from klein_services.cli.health import Readiness
from klein_services.cli.process import PROCESSES
from klein_services.cli.suite import Suite


def wait_with_progress(
    suite: Suite,
    console: Console,
    *,
    cancelled: Callable[[], bool] = lambda: False,
    on_poll: Callable[[], None] = lambda: None,
) -> float | None:
    """Waits until the suite is ready while showing how far each process is.

    Returns:
        Seconds that it took, or `None` when `cancelled` said so first.

    Raises:
        StageDied: a process ended instead.
        CliError: it takes too long.
    """
    progress = LoadingProgress()

    def show(states: Mapping[str, Readiness]) -> None:
        for process in progress.update(states):
            if not console.is_terminal:
                console.print(f"{process} ready after {progress.seconds:.1f} s", highlight=False)
        on_poll()

    with progress.live(console) if console.is_terminal else nullcontext():
        is_ready = suite.wait_until_ready(on_change=show, cancelled=cancelled)
    return progress.seconds if is_ready else None


class LoadingProgress:
    """A line for each process: a spinner, and when it was ready."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._states: Mapping[str, Readiness] = dict.fromkeys(PROCESSES, Readiness.STARTING)
        self._ready_after: dict[str, float] = {}
        self._spinner = Spinner("dots")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def live(self, console: Console) -> Live:
        """The lines as a display that refreshes itself inside a `with` block."""
        return Live(console=console, refresh_per_second=10, get_renderable=self.render)

    def update(self, states: Mapping[str, Readiness]) -> list[str]:
        """Takes the new states; returns the processes that have become ready."""
        self._states = dict(states)
        ready = {process for process, state in states.items() if state is Readiness.READY}
        new = sorted(ready - self._ready_after.keys())
        self._ready_after |= dict.fromkeys(new, self.seconds)
        return new

    def render(self) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        for process, state in self._states.items():
            ready_after = self._ready_after.get(process)
            if ready_after is None:
                grid.add_row(self._spinner, process, state.value)
            else:
                grid.add_row(Text("✓", "green"), process, f"ready after {ready_after:.1f} s")
        return grid


_COLORS = dict(zip(PROCESSES, ("cyan", "magenta", "green", "yellow"), strict=True))


class FollowedLogs:
    """Shows what was logged since it was last asked; nothing where `console` is None."""

    def __init__(self, folder: Path, console: Console | None) -> None:
        self._console = console
        self._files = {process: folder / f"{process}.log" for process in PROCESSES}
        self._offsets = dict.fromkeys(PROCESSES, 0)

    def show_new(self) -> None:
        if self._console is None:
            return
        for process in PROCESSES:
            for line in self._new_lines(process):
                self._console.print(
                    Text.assemble((f"{process:<13} ", _COLORS[process]), line), soft_wrap=True
                )

    def _new_lines(self, process: str) -> list[str]:
        if not self._files[process].exists():
            return []
        with self._files[process].open("rb") as log:
            log.seek(self._offsets[process])
            complete, newline, _ = log.read().rpartition(b"\n")
        self._offsets[process] += len(complete) + len(newline)
        return complete.decode(errors="replace").splitlines()


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Counts signals that ask this process to stop, inside a `with` block of the main thread."""

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
        """Whether a second signal came."""
        return self._insisted.is_set()

    def wait(self, seconds: float) -> bool:
        """Waits for the first signal; whether it came."""
        return self._requested.wait(seconds)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        (self._insisted if self.requested else self._requested).set()
