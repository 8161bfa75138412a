"""Processes that one with imported modules forks, so that ten replicas start on two cores within seconds.

Importing takes most of a replica's start, all of it on the processor. Only modules are forked: settings, model, device
and servers are the replica's own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Mapping
from importlib import import_module
from multiprocessing.context import ForkServerContext
from pathlib import Path

from klein_services.denoiser.__main__ import ENTRY

MODULE = "benchmarks.delayed_denoiser"


class PreloadedProcess:
    """A delayed denoiser, with the part of `subprocess.Popen` that benchmarks need.

    Args:
        environment: all of its variables.
        log: takes its output.
    """

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self._process = _context().Process(target=_serve, args=(dict(environment), log))
        self._process.start()

    @property
    def pid(self) -> int:
        return int(self._process.pid or 0)

    def poll(self) -> int | None:
        """Returns the exit code; `None` while it runs."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end and returns the exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(MODULE, timeout or 0.0)
        return code


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([MODULE, "klein_services.denoiser.application"])
    return context


def _serve(environment: Mapping[str, str], log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    import_module(MODULE)
    raise SystemExit(ENTRY.cli_main([]))
