"""Restarts of a suite's processes that end by themselves."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from klein_services.cli.probes import Probes, StartupPhase
from klein_services.cli.process import ProcessDied
from klein_services.cli.suite import Suite

DEATH_LIMIT = 3
DEATH_WINDOW_SECONDS = 60.0
FIRST_PAUSE_SECONDS = 0.5


@dataclass
class _History:
    """Deaths of one process, and where its restart is."""

    recent: deque[float] = field(default_factory=deque)
    """Times of the deaths of the last minute."""
    unserved: int = 0
    """Deaths since it last served."""
    due: float | None = None
    """Time of the next start; `None` when none is planned."""
    is_loading: bool = False
    """Whether it was restarted and does not serve yet."""

    def add_death(self, now: float) -> int:
        """Counts a death and returns how many there were in a row."""
        self.recent.append(now)
        while now - self.recent[0] > DEATH_WINDOW_SECONDS:
            self.recent.popleft()
        self.unserved += 1
        return max(len(self.recent), self.unserved)


class Restarts:
    """Restarts each process that ends, after a pause that doubles with each death in a row.

    The third death of a process within a minute, or the third without serving in between, ends the suite.

    Args:
        suite: the suite, ready once; a process that ends before would only end again.
        say: shows a line to the user.
    """

    def __init__(self, suite: Suite, say: Callable[[str], None]) -> None:
        self._suite = suite
        self._say = say
        self._histories = {process: _History() for process in suite.processes}
        self._probes = Probes(suite.probe_addresses)

    def __enter__(self) -> Restarts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._probes.close()

    def check(self) -> None:
        """Notices deaths, starts what is due, and reports what serves again; returns soon.

        Raises:
            ProcessDied: a process died too often.
        """
        now = time.monotonic()
        for process, history in self._histories.items():
            child = self._suite.children[process]
            if history.due is None and child.exit_code is not None:
                deaths = history.add_death(now)
                if deaths >= DEATH_LIMIT:
                    raise ProcessDied(child, deaths, self._suite.flags(process))
                pause = FIRST_PAUSE_SECONDS * 2.0**deaths
                history.due, history.is_loading = now + pause, False
                self._say(f"The {process} ended {child.ending}; it starts again in {pause:.0f} s.")
            elif history.due is not None and now >= history.due:
                self._suite.restart(process)
                history.due, history.is_loading = None, True
        loading = [name for name, history in self._histories.items() if history.is_loading]
        for process, phase in self._probes.check(loading).items():
            if phase is StartupPhase.READY:
                self._histories[process].is_loading = False
                self._histories[process].unserved = 0
                self._say(f"The {process} serves again.")
