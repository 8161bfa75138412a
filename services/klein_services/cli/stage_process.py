"""`python -m klein_services.cli.stage_process STAGE`: a stage that ends when the process that started it does.

Its standard input is a pipe whose other end only the parent holds. However the parent dies, the kernel closes
that end, and the stage reads the end of the file.
"""

from __future__ import annotations

import importlib
import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping

from klein_services.runtime.settings import ProcessSettings

STOP_SECONDS = 5.0
"""Time for a stage whose parent is gone to stop by itself."""


def settings_class(stage: str) -> type[ProcessSettings]:
    """Returns the one class of a stage's settings module that derives from ProcessSettings."""
    module = importlib.import_module(f"klein_services.{stage.replace('-', '_')}.settings")
    found = [
        each
        for each in vars(module).values()
        if inspect.isclass(each) and issubclass(each, ProcessSettings) and each.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} has {len(found)} settings classes; exactly one is needed")
    return found[0]


def run_stage(stage: str, environment: Mapping[str, str], overrides: Mapping[str, str]) -> int:
    """Runs a stage in this process until SIGTERM or SIGINT; returns its exit code."""
    module = importlib.import_module(f"klein_services.{stage.replace('-', '_')}.__main__")
    exit_code: int = module.main(environment, overrides)
    return exit_code


def end_with_parent() -> None:
    """Starts a thread that stops this process when its standard input ends, by force if it does not stop."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(STOP_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    sys.exit(run_stage(sys.argv[1], os.environ, {}))
