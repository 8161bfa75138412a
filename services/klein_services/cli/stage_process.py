"""`python -m klein_services.cli.stage_process STAGE`: a stage that ends when the process that started it does.

Its standard input is a pipe whose other end only the parent holds. However the parent dies, the kernel closes
that end, and the stage reads the end of the file.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping

LONGEST_GOODBYE_SECONDS = 5.0


def run_stage(stage: str, environment: Mapping[str, str], overrides: Mapping[str, str]) -> int:
    """Runs a stage in this process until it is told to stop; returns its exit code."""
    module = importlib.import_module(f"klein_services.{stage.replace('-', '_')}.__main__")
    exit_code: int = module.main(environment, overrides)
    return exit_code


def end_with_parent() -> None:
    """Stops this process soon after its standard input ends, by force if it does not stop by itself."""
    threading.Thread(target=_outlast_parent, name="parent-watch", daemon=True).start()


def _outlast_parent() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LONGEST_GOODBYE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    end_with_parent()
    sys.exit(run_stage(sys.argv[1], os.environ, {}))
