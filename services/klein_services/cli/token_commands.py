"""`klein token`: new tokens of tenants for the orchestrator's tokens file."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from klein_services.cli.errors import CliError
from klein_services.cli.exit_codes import MISUSED
from klein_services.cli.output import messages

commands = typer.Typer(no_args_is_help=True, help="Make tokens for the clients of an orchestrator.")


@commands.callback()
def token() -> None:
    """Make tokens for the clients of an orchestrator."""


@commands.command(
    epilog="[bold]klein token new acme[/] prints the token and the table for the file of KLEIN_TOKENS_FILE.\n\n"
    "[bold]klein token new acme --file tokens.toml > acme.token[/] adds the table to the file.\n\n"
    "To replace a token, add the new hash to the tenant's list: sha256 = ['OLD', 'NEW']."
)
def new(
    name: Annotated[str, typer.Argument(help="The tenant's name, in logs, metrics and usage.")],
    weight: Annotated[
        float, typer.Option(metavar="NUMBER", help="Share of a busy stage, relative to other tenants.")
    ] = 1.0,
    requests_in_flight: Annotated[
        int | None, typer.Option(metavar="NUMBER", help="Most requests at a time; by default any number.")
    ] = None,
    megapixels_per_minute: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER", help="Most megapixels of input and output in a minute; by default any."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A model that it may use; may be repeated; by default all."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Tokens file to add the table to; made if missing.")
    ] = None,
) -> None:
    """Print a new token, this once, and the table that admits it."""
    from klein_services.orchestrator.tokens import Tenant, TokensError, new_token, parse_tokens, tenant_table

    tenant = Tenant(
        name=name,
        weight=weight,
        requests_in_flight=requests_in_flight,
        megapixels_per_minute=megapixels_per_minute,
        models=tuple(model) if model else None,
    )
    secret = new_token()
    try:
        table = tenant_table(tenant, secret)
        parse_tokens(table.encode(), "token new")
        if file is not None:
            add_table(file, name, table)
    except TokensError as error:
        raise CliError(f"{error}.", exit_code=MISUSED) from error
    except UnicodeEncodeError as error:
        raise CliError("A name is not valid UTF-8.", exit_code=MISUSED) from error
    console = messages()
    console.print("The token of this tenant; it is shown only now:", highlight=False, soft_wrap=True)
    sys.stdout.write(f"{secret}\n")
    sys.stdout.flush()
    if file is None:
        console.print("For the file of KLEIN_TOKENS_FILE:", highlight=False, soft_wrap=True)
        sys.stdout.write(f"\n{table}")
    else:
        text = Text(f"Its table is in {file}; a running orchestrator reads it within seconds.")
        console.print(text, soft_wrap=True)


def add_table(file: Path, name: str, table: str) -> None:
    """Adds a tenant's table to a tokens file, whose readers see the old file or the new one.

    Raises:
        TokensError: the file cannot be used.
        CliError: it has the name already, or cannot be written.
    """
    from klein_services.orchestrator.tokens import parse_tokens, read_tokens

    path = file.resolve()
    content = ""
    try:
        if path.exists() and path.stat().st_size:
            if name in read_tokens(path).names:
                raise CliError(
                    f"{file} has a table of {name} already.",
                    "To replace its token, run this without --file and add the new hash to its list sha256.",
                    MISUSED,
                )
            content = path.read_text(encoding="utf-8").rstrip("\n") + "\n\n"
        whole = (content + table).encode()
        parse_tokens(whole, str(file))
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o640
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as output:
                output.write(whole)
                os.fchmod(output.fileno(), mode)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink()
            raise
    except OSError as error:
        raise CliError(f"{file} cannot be written: {error.strerror}.", exit_code=MISUSED) from error
