"""The `klein` command."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from typing import Annotated

import typer

from services.cli import call_commands, model_commands
from services.cli.console import messages
from services.cli.errors import FAILED, INTERRUPTED, CliError
from services.cli.serve import StageGroup

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


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; every failure becomes a sentence on standard error and an exit code."""
    try:
        app(arguments)
    except CliError as error:
        error.show(messages())
        return error.exit_code
    except KeyboardInterrupt:
        messages().print("Cancelled.")
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("KLEIN_TRACEBACK"):
            raise
        sentence = f"{type(error).__name__}: {error}. This is a fault in klein itself."
        CliError(sentence, "Set KLEIN_TRACEBACK=1 to see where, and report it.").show(messages())
        return FAILED
    return 0


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
    """FLUX.2 klein as four gRPC services: start them, watch them, make pictures with them."""


if __name__ == "__main__":
    sys.exit(main())
