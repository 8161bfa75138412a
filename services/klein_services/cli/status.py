"""`klein status` and `klein adapters`: tables of a running suite's models, stages and adapters."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from klein_client import KleinError, Model, Stage, Status
from klein_services.cli.errors import call_error
from klein_services.cli.exit_codes import FAILED
from klein_services.cli.output import file_size
from klein_services.cli.process import STAGES
from klein_services.cli.target import Target, open_client


def run_status(target: Target | str, timeout_seconds: float, console: Console, token: str = "") -> int:
    """Prints a table; returns 0 only when every stage of every model serves.

    Raises:
        CliError: the orchestrator does not answer.
    """
    status = fetch_status(target, timeout_seconds, token)
    console.print(status_table(status))
    for model in status.models:
        if model.description:
            console.print(Text(model_text(model)), soft_wrap=True)
    for line in status.problems:
        console.print(Text(line, "red"), soft_wrap=True)
    if not status.models:
        console.print(f"The orchestrator at {target} has no model.")
    return 0 if status.is_serving else FAILED


def fetch_status(target: Target | str, timeout_seconds: float, token: str = "") -> Status:
    """Returns the state of an orchestrator's models; raises CliError when it does not answer."""
    try:
        with open_client(target, token) as client:
            return client.status(timeout_seconds=timeout_seconds)
    except KleinError as error:
        raise call_error(error, target) from error


def model_text(model: Model) -> str:
    """Returns a model's name with its description, if there is one, as a paragraph that begins with the name."""
    if model.description.startswith(model.name):
        return model.description
    return f"{model.name}: {model.description}".removesuffix(": ")


def status_table(status: Status) -> Table:
    """Returns a table with a row for each stage of each model."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("MODEL", "STAGE", "HEALTH", "DEVICE", "RUNNING", "QUEUED"):
        table.add_column(heading, no_wrap=True)
    table.add_column("TARGET", overflow="fold")
    for model in status.models:
        name = f"{model.name} (default)" if len(status.models) > 1 and model.is_default else model.name
        for position, stage in enumerate(model.stages):
            title = stage.name or (STAGES[position] if position < len(STAGES) else "")
            if stage.is_reachable:
                device = f"{stage.device} {stage.dtype}".strip()
                queue = f"{stage.queued_count}/{stage.queue_limit}"
                cells = (_health(stage), device, str(stage.running_count), queue)
            else:
                cells = (Text("unreachable", "red"), "–", "–", "–")
            table.add_row(name if position == 0 else "", title, *cells, stage.target)
    return table


def _health(stage: Stage) -> Text:
    if not stage.is_serving:
        # A stage whose model is loaded and that does not serve is on its way out.
        return Text("draining" if stage.is_loaded else "loading", "yellow")
    return Text("wrong", "red") if stage.problem else Text("serving", "green")


def run_adapters(target: Target | str, timeout_seconds: float, console: Console, token: str = "") -> int:
    """Prints a table of every model's adapters; returns 0 only when all of them can be used.

    Raises:
        CliError: the orchestrator does not answer.
    """
    status = fetch_status(target, timeout_seconds, token)
    for model in status.models:
        if model.adapters:
            console.print(adapters_table(model))
        else:
            console.print(f"{model.name} offers no adapters.", highlight=False)
        for adapter in model.adapters:
            for note in adapter.notes:
                console.print(Text(f"{adapter.name}: {note}", "yellow"), soft_wrap=True)
    problems = adapter_problems(status)
    for line in problems:
        console.print(Text(line, "red"), soft_wrap=True)
    return FAILED if problems else 0


def adapters_table(model: Model) -> Table:
    """Returns a table with a row for each adapter of a model."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(f"ADAPTER OF {model.name}", overflow="fold")
    for heading in ("KIND", "RANK", "LAYERS", "SIZE"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "KIND" else "right")
    for adapter in model.adapters:
        details = (adapter.kind, str(adapter.rank or "–"), str(adapter.layer_count))
        cells = (Text("unusable", "red"), "–", "–") if adapter.problem else details
        table.add_row(Text(adapter.name), *cells, file_size(adapter.size_bytes))
    return table


def adapter_problems(status: Status) -> list[str]:
    """Returns a line for each adapter that cannot be used."""
    return [
        f"{model.name}: {adapter.problem}"
        for model in status.models
        for adapter in model.adapters
        if adapter.problem
    ]
