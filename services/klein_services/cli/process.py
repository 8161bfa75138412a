"""Child processes of the suite: names, start, end, logs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from klein_services.cli.errors import CliError

DENOISER = "denoiser"
STAGES = ("text-encoder", DENOISER, "vae-decoder")
ORCHESTRATOR = "orchestrator"
GATEWAY = "gateway"
SUITE = (*STAGES, ORCHESTRATOR)
"""Processes of every suite."""
PROCESSES = (*SUITE, GATEWAY)
"""Everything that `klein serve` runs."""
TAIL_LINES = 12


@dataclass(frozen=True)
class ChildSpec:
    """Description of a process to start."""

    name: str
    """Name of the process, for example `vae-decoder`."""
    address: str
    """Address that clients on this machine use."""
    environment: Mapping[str, str]
    """All environment variables of the child."""
    log_file: Path
    appends_log: bool = False
    """Whether the log file keeps the lines of the process that this one replaces."""


class Child:
    """A running process of the suite. It ends when its parent does, however the parent ends."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        with spec.log_file.open("ab" if spec.appends_log else "wb") as log:
            # A new session: Ctrl-C in a terminal reaches only the parent, which stops the children in order.
            self._process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "klein_services.cli.stage_process", spec.name],
                env=dict(spec.environment),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def address(self) -> str:
        return self.spec.address

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """`None` while the process runs; negative when a signal ended it."""
        return self._process.poll()

    @property
    def ending(self) -> str:
        """End of the process in words: its signal or its exit code."""
        code = self.exit_code
        if code is not None and code < 0:
            return f"by signal {signal.Signals(-code).name}"
        return f"with exit code {code}"

    def terminate(self) -> None:
        """Asks the process to finish its requests and stop."""
        if self.exit_code is None:
            self._process.terminate()

    def kill(self) -> None:
        """Ends the process at once."""
        if self.exit_code is None:
            self._process.kill()

    def wait(self, timeout_seconds: float) -> bool:
        """Waits for the end of the process; returns whether it came in time."""
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return False
        if self._process.stdin is not None:
            self._process.stdin.close()
        return True

    def log_tail(self) -> list[str]:
        """Returns the last lines of the log file."""
        with self.spec.log_file.open(encoding="utf-8", errors="replace") as log:
            return [line.rstrip() for line in deque(log, TAIL_LINES)]


class ProcessDied(CliError):
    """A process ended by itself. Names it, shows its last log lines and their file.

    Args:
        child: the process that ended.
        deaths: how often it ended and was restarted, this time included.
        flags: `KLEIN_` variable → flag of the command that set it, which replaces it in the log lines.
    """

    def __init__(self, child: Child, deaths: int = 1, flags: Mapping[str, str] | None = None) -> None:
        self.tail = [with_flags(line, flags or {}) for line in child.log_tail()]
        reason = next((line.strip() for line in reversed(self.tail) if line.strip()), "it wrote no log")
        super().__init__(
            f"The {child.name} ended {child.ending}."
            if deaths == 1
            else f"The {child.name} ended {deaths} times in a row, at last {child.ending}: {reason}",
            f"Its last lines are above, all of them in {child.spec.log_file}.",
        )

    def show(self, console: Console) -> None:
        for line in self.tail:
            console.print(Text(f"  {line}", "dim"), soft_wrap=True)
        super().show(console)


def with_flags(text: str, flags: Mapping[str, str]) -> str:
    """Replaces `KLEIN_` variables in a text by the flags that set them."""
    return re.sub(r"\bKLEIN_[A-Z_]+", lambda match: flags.get(match[0], match[0]), text)


def wait_for_all(children: list[Child], seconds: float) -> list[Child]:
    """Waits for the end of all; returns those that still run after `seconds`."""
    end = time.monotonic() + seconds
    return [child for child in children if not child.wait(max(0.0, end - time.monotonic()))]


def inherited_environment() -> dict[str, str]:
    """Returns this process's environment plus what lets Python children import the same packages."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        # Without it -m puts the current folder first, where packages may have the same names.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }
