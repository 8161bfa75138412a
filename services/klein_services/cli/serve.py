"""`klein serve STAGE`: one stage in this process, with a flag for each of its settings."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from klein_services.cli.errors import CliError, with_period
from klein_services.cli.exit_codes import MISUSED
from klein_services.cli.model_store import find_model
from klein_services.cli.prerequisites import require_temporary_folder, require_torch
from klein_services.cli.process import PROCESSES, STAGES, with_flags
from klein_services.cli.stage_process import run_stage, settings_class
from klein_services.runtime.settings import ProcessSettings, SettingsError, load_settings, variable_name
from klein_services.runtime.settings_report import describe, misspelled
from klein_services.runtime.stage_settings import EMBEDDED_MODEL

_SHORT_FLAGS = {"model_path": "--model"}


class StageGroup(TyperGroup):
    """One command per stage, made from the stage's settings on first use."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(PROCESSES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in PROCESSES:
            return None
        only = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)
        about = (
            f"Run the {cmd_name} in this process until SIGTERM or Ctrl-C. "
            f"Each flag has a variable: --metrics-port is {variable_name('metrics_port')}; the flag wins."
        )
        examples = (
            f"[bold]klein serve {cmd_name} --check-config[/]\n\n"
            f"[bold]KLEIN_LOG_LEVEL=debug klein serve {cmd_name}[/]"
        )
        run = _with_flags(cmd_name, settings_class(cmd_name))
        only.command(name=cmd_name, help=about, epilog=examples)(run)
        return typer.main.get_command(only)


def run_serve(stage: str, overrides: dict[str, str], *, check_config: bool) -> int:
    """Runs a stage in this process, or shows and checks its settings; returns the exit code.

    Raises:
        CliError: a setting has an invalid value, or the model does not exist.
    """
    environment = dict(os.environ)
    if stage in STAGES:
        overrides, environment = _with_found_model(overrides, environment)
    try:
        loaded = load_settings(settings_class(stage), environment, overrides, check=True)
    except SettingsError as error:
        hint = f"`klein serve {stage} --help` shows every setting."
        flags = {variable_name(name): flag_of(name) for name in overrides}
        raise CliError(with_period(with_flags(str(error), flags)), hint, MISUSED) from error
    if check_config:
        typer.echo(describe(loaded))
        for sentence in misspelled(type(loaded.settings), environment):
            typer.echo(f"{sentence}.", err=True)
        return 0
    if stage in STAGES:
        require_torch()
        require_temporary_folder()
    return run_stage(stage, environment, overrides)


def _with_found_model(
    overrides: dict[str, str], environment: dict[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Replaces the name of a pulled model by its folder, in the flags or the environment.

    Raises:
        CliError: there is no such folder or file, and no model of that name was pulled.
    """
    variable = variable_name("model_path")
    given = overrides.get("model_path") or environment.get(variable) or EMBEDDED_MODEL
    if given == EMBEDDED_MODEL:
        return overrides, environment
    place = str(find_model(given))
    if overrides.get("model_path"):
        return overrides | {"model_path": place}, environment
    return overrides, environment | {variable: place}


def _with_flags(stage: str, settings: type[ProcessSettings]) -> Callable[..., None]:
    """Returns a function that runs a stage, with a signature from which typer makes a flag for each setting."""

    def run(*, check_config: bool, **flags: str | None) -> None:
        overrides = {name: value for name, value in flags.items() if value is not None}
        raise typer.Exit(run_serve(stage, overrides, check_config=check_config))

    check = Annotated[
        bool, typer.Option("--check-config", help="Show the settings with their sources and exit.")
    ]
    annotations: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        flags = list(dict.fromkeys([flag_of(field.name), f"--{field.name.replace('_', '-')}"]))
        metavar = "|".join(field.metadata.get("choices") or ()) or "VALUE"
        default = f" [dim]\\[default: {field.default}][/]" if field.default != "" else ""
        help_text = f"{field.metadata.get('help', '')}.{default}"
        option = typer.Option(*flags, help=help_text, metavar=metavar, show_default=False)
        annotations[field.name] = Annotated[str | None, option]
    keyword = inspect.Parameter.KEYWORD_ONLY
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter("check_config", keyword, default=False, annotation=check),
            *(
                inspect.Parameter(name, keyword, default=None, annotation=kind)
                for name, kind in annotations.items()
            ),
        ]
    )
    run.__annotations__ = {"check_config": check, **annotations}
    return run


def flag_of(setting: str) -> str:
    """Returns the flag of a setting, the short one where there are two."""
    return _SHORT_FLAGS.get(setting, f"--{setting.replace('_', '-')}")
