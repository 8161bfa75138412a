"""PreloadedChild: a process of the suite that starts within a second, because another one has imported its modules.

Importing takes most of a stage's start, all of it on the processor. Only modules are forked: settings, model, device
and servers are the process's own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path

from klein_services.cli.process import Child, ChildSpec
from klein_services.cli.stage_process import run_stage

_MODULES = (
    "tests.e2e.preloaded_child",
    "klein_core.text_encoder.encoder",
    "klein_services.text_encoder.__main__",
    "klein_services.denoiser.__main__",
    "klein_services.denoiser.application",
    "klein_services.vae_decoder.__main__",
    "klein_services.vae_decoder.servicer",
    "klein_services.orchestrator.__main__",
    "klein_services.orchestrator.servicer",
)


class PreloadedChild(Child):
    """Is used like a `Child`; it ends when the process that started it does."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self._forked = _context().Process(
            target=_serve, args=(spec.name, dict(spec.environment), spec.log_file, spec.appends_log)
        )
        self._forked.start()

    @property
    def pid(self) -> int:
        return int(self._forked.pid or 0)

    @property
    def exit_code(self) -> int | None:
        return self._forked.exitcode

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def wait(self, timeout_seconds: float) -> bool:
        self._forked.join(timeout_seconds)
        return self.exit_code is not None

    def _send(self, number: signal.Signals) -> None:
        if self.exit_code is None:
            os.kill(self.pid, number)


@cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_MODULES))
    return context


def _serve(stage: str, environment: Mapping[str, str], log: Path, appends_log: bool) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if appends_log else os.O_TRUNC))
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    # Not SystemExit: multiprocessing would run the exit functions of a process that was not forked.
    os._exit(run_stage(stage, environment, {}))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
