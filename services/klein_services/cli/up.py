"""`klein up`: the whole suite on this machine until Ctrl-C."""

from __future__ import annotations

import shlex
from functools import partial

from rich.console import Console
from rich.text import Text

from klein_services.cli.errors import CliError
from klein_services.cli.exit_codes import FAILED
from klein_services.cli.ports import DEFAULT_PORT, LOOPBACK
from klein_services.cli.process import ORCHESTRATOR, SUITE
from klein_services.cli.restarts import Restarts
from klein_services.cli.startup import FollowedLogs, StopSignals, wait_with_progress
from klein_services.cli.status import fetch_status, model_text
from klein_services.cli.suite import METRICS_PORTS, Suite, SuiteOptions

WATCH_SECONDS = 0.1
DESCRIPTION_SECONDS = 10.0


def run_up(options: SuiteOptions, console: Console, *, verbose: bool) -> int:
    """Runs the suite until a signal to stop; returns the exit code.

    Raises:
        ProcessDied: a process ended before it was ready, or too often after; the others were stopped.
        CliError: the suite cannot start, or its stages do not fit each other.
    """
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
                about = about_model(suite)
                if options.has_gateway and suite.gateway_problem:
                    console.print(f"Without the gateway: {suite.gateway_problem}.", soft_wrap=True)
                for text in (
                    f"Ready after {seconds:.1f} s at {suite.target}.",
                    about,
                    how_to_call(suite),
                ):
                    console.print(Text(text), soft_wrap=True)
                with Restarts(suite, partial(console.print, style="yellow", soft_wrap=True)) as restarts:
                    while not signals.wait(WATCH_SECONDS):
                        restarts.check()
                        logs.show_new()
        finally:
            console.print("Stopping; Ctrl-C stops at once.")
            killed = suite.stop(insisted=lambda: signals.insisted)
            console.print(f"Stopped, {' and '.join(killed)} by force." if killed else "Stopped.")
            logs.show_new()
    return FAILED if killed else 0


def about_model(suite: Suite) -> str:
    """Returns the name of the suite's model and, when the orchestrator answers, its description.

    Raises:
        CliError: every stage serves, but the model cannot be used, because the stages do not fit each other.
    """
    if ORCHESTRATOR in suite.health_ports:
        # The authority that issued its certificate is not known here.
        return suite.model_name
    try:
        models = fetch_status(suite.target, DESCRIPTION_SECONDS).models
    except CliError:
        # The suite serves; a description that comes too late is no reason to stop it.
        return suite.model_name
    for model in models:
        # A stage that died since is restarted; only a misfit lasts.
        if not model.is_serving and all(stage.is_serving for stage in model.stages):
            raise CliError(
                f"{model.name} cannot be used: {model.stages[0].problem}.",
                "--transformer, --vae and --text-encoder must be parts of one kind of model.",
            )
    return next((model_text(model) for model in models if model.name == suite.model_name), suite.model_name)


def how_to_call(suite: Suite) -> str:
    """Returns commands that call the suite, and the addresses of its metrics."""
    address = shlex.quote(suite.target)
    target = "" if suite.target == f"{LOOPBACK}:{DEFAULT_PORT}" else f" --target {address}"
    grpcurl = "-plaintext"
    if ORCHESTRATOR in suite.health_ports:
        target, grpcurl = f"{target} --tls-ca CA.pem", "-cacert CA.pem"
        if "tls_client_ca" in suite.options.tls:
            target += " --tls-certificate CLIENT.pem --tls-key CLIENT.key"
            grpcurl += " -cert CLIENT.pem -key CLIENT.key"
    # `klein top` shows no gateway, whose page has nothing about the device.
    ports = [suite.metrics_ports[process] for process in SUITE]
    is_default = ports == list(METRICS_PORTS[: len(SUITE)])
    pages = "" if is_default else "".join(f" --metrics {LOOPBACK}:{port}" for port in ports)
    metrics = "\n".join(
        f"    {process:<13} http://127.0.0.1:{suite.metrics_ports[process]}/metrics"
        for process in suite.processes
    )
    page = f"In a browser: {suite.gateway_url}/\n" if suite.gateway_url else ""
    http_call = (
        f"""    curl {suite.gateway_url}/v1/images/generations -H 'Content-Type: application/json' \\
        -d '{{"prompt": "a blue star"}}'
"""
        if suite.gateway_url
        else ""
    )
    return f"""
{page}Call it:
    klein generate "a large red heart on a yellow background"{target} -o heart.png
    klein status{target}
    klein top{pages}
    grpcurl {grpcurl} -d '{{"spec": {{"prompt": "a blue star"}}}}' {address} \\
        klein_api.v1.ImageService/GenerateImage
{http_call}Metrics:
{metrics}
Ctrl-C stops everything."""
