"""`klein adapters`: what requests may name."""

from __future__ import annotations

import asyncio

from rich.console import Console
from rich.table import Table
from rich.text import Text

from klein_api.v1 import image_service_pb2 as api
from services.cli.byte_counts import file_size
from services.cli.exit_codes import FAILED
from services.cli.status import list_models


def run_adapters(target: str, timeout_seconds: float, console: Console) -> int:
    """Prints a table of every model's adapters; returns 0 only when all of them can be used.

    Raises:
        CliError: the orchestrator does not answer.
    """
    answer = asyncio.run(list_models(target, timeout_seconds))
    for model in answer.models:
        if model.adapters:
            console.print(adapters_table(model))
        else:
            console.print(f"{model.name} offers no adapters.", highlight=False)
    for line in problems(answer):
        console.print(Text(line, "red"), soft_wrap=True)
    return FAILED if problems(answer) else 0


def adapters_table(model: api.RoutedModel) -> Table:
    """A row for each adapter of a model."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(f"ADAPTER OF {model.name}", overflow="fold")
    for heading in ("KIND", "RANK", "LAYERS", "SIZE"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "KIND" else "right")
    for adapter in model.adapters:
        told = (adapter.kind, str(adapter.rank or "–"), str(adapter.layer_count))
        cells = (Text("unusable", "red"), "–", "–") if adapter.problem else told
        table.add_row(Text(adapter.name), *cells, file_size(adapter.size_bytes))
    return table


def problems(answer: api.ListModelsResponse) -> list[str]:
    """A line for each adapter that cannot be used."""
    return [
        f"{model.name}: {adapter.problem}"
        for model in answer.models
        for adapter in model.adapters
        if adapter.problem
    ]
