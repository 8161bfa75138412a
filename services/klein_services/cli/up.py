"""`klein up`: the whole suite on this machine until Ctrl-C."""

from __future__ import annotations

import shlex

from rich.console import Console

from klein_services.cli.exit_codes import FAILED
from klein_services.cli.ports import DEFAULT_PORT, LOOPBACK, require_free
from klein_services.cli.process import PROCESSES
from klein_services.cli.startup import FollowedLogs, StopSignals, wait_with_progress
from klein_services.cli.suite import Suite, SuiteOptions

WATCH_SECONDS = 0.1


def run_up(options: SuiteOptions, console: Console, *, verbose: bool) -> int:
    """Runs the suite until a signal comes; returns the exit code.

    Raises:
        StageDied: one of the four ended by itself; the others were stopped.
        CliError: the suite cannot start.
    """
    require_free(options.port, options.host)
    suite = Suite(options)
    logs = FollowedLogs(suite.log_folder, console if verbose else None)
    with StopSignals() as signals, suite:
        try:
            console.print(
                f"Starting {suite.model_name}; logs in {suite.log_folder}", highlight=False, soft_wrap=True
            )
            seconds = wait_with_progress(
                suite, console, cancelled=lambda: signals.requested, on_poll=logs.show_new
            )
            if seconds is not None:
                console.print(how_to_call(suite, seconds), highlight=False, soft_wrap=True)
                _watch(suite, signals, logs)
        finally:
            exit_code = _stop(suite, signals, console)
            logs.show_new()
    return exit_code


def _watch(suite: Suite, signals: StopSignals, logs: FollowedLogs) -> None:
    while not signals.wait(WATCH_SECONDS):
        suite.raise_if_died()
        logs.show_new()


def _stop(suite: Suite, signals: StopSignals, console: Console) -> int:
    console.print("Stopping; Ctrl-C stops at once.")
    killed = suite.stop(insisted=lambda: signals.insisted)
    if killed:
        console.print(f"Stopped, {' and '.join(killed)} by force.")
        return FAILED
    console.print("Stopped.")
    return 0


def how_to_call(suite: Suite, seconds: float) -> str:
    """What a person can do now that the suite runs."""
    address = shlex.quote(suite.target)
    target = "" if suite.target == f"{LOOPBACK}:{DEFAULT_PORT}" else f" --target {address}"
    metrics = "\n".join(
        f"    {process:<13} http://127.0.0.1:{suite.metrics_ports[process]}/metrics" for process in PROCESSES
    )
    return f"""
Ready after {seconds:.1f} s at {suite.target}. Call it:
    klein generate "a large red heart on a yellow background"{target} -o heart.png
    klein status{target}
    grpcurl -plaintext -d '{{"spec": {{"prompt": "a blue star"}}}}' {address} \\
        klein_api.v1.ImageService/GenerateImage
Metrics:
{metrics}
Ctrl-C stops everything."""
