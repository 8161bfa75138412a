"""The `klein` command: its groups of commands, and the exit code and sentence of each failure."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from typing import Annotated

import typer

from klein_services.cli import call_commands, model_commands, token_commands
from klein_services.cli.errors import CliError
from klein_services.cli.exit_codes import FAILED, INTERRUPTED
from klein_services.cli.output import messages
from klein_services.cli.serve import StageGroup

app = typer.Typer(
    name="klein",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "First steps: [bold]klein up[/] in one terminal, then in another\n\n"
        '[bold]klein generate "a large red heart on a yellow background" -o heart.png[/]'
    ),
)
serve_app = typer.Typer(
    cls=StageGroup, no_args_is_help=True, help="Run one stage of the suite in this process."
)
for group in (model_commands.commands, call_commands.commands):
    app.add_typer(group)
app.add_typer(serve_app, name="serve")
app.add_typer(token_commands.commands, name="token")


def run(arguments: list[str] | None = None) -> int:
    """Runs the command; every failure becomes a sentence on standard error and an exit code."""
    exit_code = 0
    try:
        try:
            app(arguments)
        except SystemExit as end:
            exit_code = int(end.code or 0)
            if exit_code == INTERRUPTED:
                # typer turns Ctrl-C into this exit code and prints nothing.
                raise KeyboardInterrupt from end
        sys.stdout.flush()
    except CliError as error:
        error.show(messages())
        return error.exit_code
    except Exception as error:
        if os.environ.get("KLEIN_TRACEBACK"):
            raise
        try:
            sys.stdout.flush()
        except OSError:
            # Python would print a second error at its exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        unexpected_error(error).show(messages())
        return FAILED
    return exit_code


def unexpected_error(error: Exception) -> CliError:
    """Returns the sentence for an exception that no command handled: a refusal of the system, or a defect."""
    if isinstance(error, OSError) and error.strerror:
        what = error.filename if isinstance(error.filename, str) else "A file, its output or a port"
        return CliError(f"{what} cannot be used: {error.strerror}.", "KLEIN_TRACEBACK=1 shows where.")
    sentence = f"{type(error).__name__}: {error}. This is a defect of klein."
    return CliError(sentence, "Set KLEIN_TRACEBACK=1 to see where, and report it.")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"klein-suite {metadata.version('klein-suite')}")
        raise typer.Exit


@app.callback()
def klein(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """FLUX.2 klein as four gRPC services: start them, watch them, make images with them."""
