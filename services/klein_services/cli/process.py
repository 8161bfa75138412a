"""The suite's processes by name."""

from __future__ import annotations

import os
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

STAGES = ("text-encoder", "denoiser", "vae-decoder")
ORCHESTRATOR = "orchestrator"
PROCESSES = (*STAGES, ORCHESTRATOR)


TAIL_LINES = 12


@dataclass(frozen=True)
class ChildSpec:
    """What is to be started."""

    stage: str
    """The stage's name, for example `vae-decoder`."""
    address: str
    """Where clients on this machine reach it."""
    environment: Mapping[str, str]
    """All of the child's environment variables."""
    log_file: Path


class Child:
    """A running stage. It ends when its parent does, whatever ends that."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        with spec.log_file.open("wb") as log:
            # A session of its own: Ctrl-C in a terminal reaches only the parent, which stops stages in order.
            self._process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "klein_services.cli.stage_process", spec.stage],
                env=dict(spec.environment),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def stage(self) -> str:
        return self.spec.stage

    @property
    def address(self) -> str:
        return self.spec.address

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """`None` while it runs; negative when a signal ended it."""
        return self._process.poll()

    def terminate(self) -> None:
        """Asks it to finish what it does and stop."""
        if self.exit_code is None:
            self._process.terminate()

    def kill(self) -> None:
        """Ends it at once."""
        if self.exit_code is None:
            self._process.kill()

    def wait(self, timeout_seconds: float) -> bool:
        """Waits for its end; whether it came in time."""
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return False
        if self._process.stdin is not None:
            self._process.stdin.close()
        return True

    def log_tail(self) -> list[str]:
        """The last lines that it wrote."""
        with self.spec.log_file.open(encoding="utf-8", errors="replace") as log:
            return [line.rstrip() for line in deque(log, TAIL_LINES)]


class StageDied(CliError):
    """A stage ended by itself; says which, how, and its last words."""

    def __init__(self, child: Child) -> None:
        self.stage = child.stage
        self.tail = child.log_tail()
        super().__init__(
            f"The {child.stage} ended {_ending(child.exit_code)}.",
            f"Its last lines are above, all of them in {child.spec.log_file}.",
        )

    def show(self, console: Console) -> None:
        for line in self.tail:
            console.print(Text(f"  {line}", "dim"), soft_wrap=True)
        super().show(console)


def _ending(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"by signal {signal.Signals(-exit_code).name}"
    return f"with exit code {exit_code}"


def wait_for_all(children: list[Child], seconds: float) -> list[Child]:
    """Waits for the end of all; returns those that still run after `seconds`."""
    end = time.monotonic() + seconds
    return [child for child in children if not child.wait(max(0.0, end - time.monotonic()))]


def inherited_environment() -> dict[str, str]:
    """This process's environment with what lets Python children import the same packages."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        # Else -m puts the current folder first, whose packages may have our names.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }
