"""`klein status` and `klein adapters`: tables of a running suite's models, stages and adapters."""

from __future__ import annotations

import asyncio

import grpc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from klein_api.v1 import image_service_pb2 as api
from klein_services.cli.client import authorization, connect
from klein_services.cli.errors import call_error
from klein_services.cli.exit_codes import FAILED
from klein_services.cli.output import file_size
from klein_services.cli.process import STAGES
from klein_services.cli.target import Target


def run_status(target: Target | str, timeout_seconds: float, console: Console, token: str = "") -> int:
    """Prints a table; returns 0 only when every stage of every model serves.

    Raises:
        CliError: the orchestrator does not answer.
    """
    answer = asyncio.run(list_models(target, timeout_seconds, token))
    console.print(status_table(answer))
    for model in answer.models:
        if model.description:
            console.print(Text(model_text(model)), soft_wrap=True)
    for line in problems(answer):
        console.print(Text(line, "red"), soft_wrap=True)
    all_serve = bool(answer.models) and all(model.serving for model in answer.models)
    if not answer.models:
        console.print(f"The orchestrator at {target} has no model.")
    return 0 if all_serve else FAILED


async def list_models(
    target: Target | str, timeout_seconds: float, token: str = ""
) -> api.ListModelsResponse:
    """Returns an orchestrator's models; raises CliError when it does not answer."""
    try:
        async with connect(target) as stub:
            metadata = authorization(token)
            return await stub.ListModels(api.ListModelsRequest(), timeout=timeout_seconds, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        raise call_error(error, target) from error


def model_text(model: api.RoutedModel) -> str:
    """Returns a model's name with its description, if there is one, as a paragraph that begins with the name."""
    if model.description.startswith(model.name):
        return model.description
    return f"{model.name}: {model.description}".removesuffix(": ")


def status_table(answer: api.ListModelsResponse) -> Table:
    """Returns a table with a row for each stage of each model."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("MODEL", "STAGE", "HEALTH", "DEVICE", "RUNNING", "QUEUED"):
        table.add_column(heading, no_wrap=True)
    table.add_column("TARGET", overflow="fold")
    for model in answer.models:
        is_chosen = len(answer.models) > 1 and model.name == answer.default_model
        name = f"{model.name} (default)" if is_chosen else model.name
        for position, stage in enumerate(model.stages):
            described = stage.description
            title = described.stage or (STAGES[position] if position < len(STAGES) else "")
            if stage.HasField("description"):
                load, device = described.load, f"{described.device} {described.dtype}".strip()
                queue = f"{load.queued_count}/{load.queue_limit}"
                cells = (_health(stage), device, str(load.running_count), queue)
            else:
                cells = (Text("unreachable", "red"), "–", "–", "–")
            table.add_row(name if position == 0 else "", title, *cells, stage.target)
    return table


def problems(answer: api.ListModelsResponse) -> list[str]:
    """Returns a line for each problem; stages that do not fit each other share one."""
    lines = (
        f"{model.name}: {stage.problem}" for model in answer.models for stage in model.stages if stage.problem
    )
    return list(dict.fromkeys(lines))


def _health(stage: api.RoutedStage) -> Text:
    if not stage.description.serving:
        # Facts are set once the model is loaded, so a stage that has them and does not serve is on its way out.
        is_loaded = stage.description.WhichOneof("facts") is not None
        return Text("draining" if is_loaded else "loading", "yellow")
    return Text("wrong", "red") if stage.problem else Text("serving", "green")


def run_adapters(target: Target | str, timeout_seconds: float, console: Console, token: str = "") -> int:
    """Prints a table of every model's adapters; returns 0 only when all of them can be used.

    Raises:
        CliError: the orchestrator does not answer.
    """
    answer = asyncio.run(list_models(target, timeout_seconds, token))
    for model in answer.models:
        if model.adapters:
            console.print(adapters_table(model))
        else:
            console.print(f"{model.name} offers no adapters.", highlight=False)
        for adapter in model.adapters:
            for note in adapter.notes:
                console.print(Text(f"{adapter.name}: {note}", "yellow"), soft_wrap=True)
    for line in adapter_problems(answer):
        console.print(Text(line, "red"), soft_wrap=True)
    return FAILED if adapter_problems(answer) else 0


def adapters_table(model: api.RoutedModel) -> Table:
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


def adapter_problems(answer: api.ListModelsResponse) -> list[str]:
    """Returns a line for each adapter that cannot be used."""
    return [
        f"{model.name}: {adapter.problem}"
        for model in answer.models
        for adapter in model.adapters
        if adapter.problem
    ]
