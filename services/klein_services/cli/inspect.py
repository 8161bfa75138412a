"""`klein inspect`: contents of a checkpoint file or model folder, read from headers and configurations."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from klein_core.checkpoint.inspect import ComponentReport, Report, inspect_path
from klein_core.errors import CheckpointError, listed
from klein_services.cli.errors import CliError
from klein_services.cli.exit_codes import FAILED
from klein_services.cli.model_store import model_path
from klein_services.cli.output import file_size

_METADATA_SHOWN = 120


def run_inspect(path: str, console: Console, *, as_json: bool) -> int:
    """Prints a report on a file or folder; returns 0 only when a stage could load every part of it.

    Raises:
        CliError: there is no such path, it holds no part of a klein model, or it cannot be read.
    """
    try:
        report = inspect_path(model_path(path))
    except CheckpointError as error:
        # The message may begin with a path, so it stays as it is.
        raise CliError(f"This cannot be inspected: {error}.") from error
    if as_json:
        # Without rich, which would wrap long lines.
        console.file.write(json.dumps(report_table(report), indent=2) + "\n")
    else:
        _print(report, console)
    return 0 if report.is_usable else FAILED


def report_table(report: Report) -> dict[str, Any]:
    """Returns a report for JSON: the fields of `Report` and `ComponentReport`, and whether all of it is usable."""
    table: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(report), default=str))
    return table | {"usable": report.is_usable}


def _print(report: Report, console: Console) -> None:
    console.print(Text(str(report.path), "bold"), soft_wrap=True)
    for component in report.components:
        console.print()
        _print_component(component, console)
    for key, value in report.metadata.items():
        shown = value if len(value) <= _METADATA_SHOWN else f"{len(value)} characters"
        console.print(Text(_printable(f"metadata {key}: {shown}"), "dim"), soft_wrap=True)
    for problem in report.problems:
        console.print(Text(_printable(problem), "red"), soft_wrap=True)


def _print_component(report: ComponentReport, console: Console) -> None:
    layout = f"{report.style} names" + (f" behind {report.prefix}" if report.prefix else "")
    count = f"{report.tensor_count} tensors, {file_size(report.byte_count)}"
    console.print(Text.assemble((report.component, "bold"), f": {count}, {layout}"), soft_wrap=True)
    if report.shape:
        known = f"; as in {' or '.join(report.variants)}" if report.variants else "; of no published model"
        console.print(Text(f"  {report.shape}{known}"), soft_wrap=True)
    numbers = [Column(heading, justify="right", no_wrap=True) for heading in ("TENSORS", "SIZE")]
    words = [Column(heading, no_wrap=True) for heading in ("GROUP", "PRECISION")]
    table = Table(*words, *numbers, box=None, pad_edge=False, padding=(0, 2, 0, 2))
    for share in report.shares:
        cells = (share.group, share.precision, str(share.tensor_count), file_size(share.byte_count))
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    for what, names in (("missing", report.missing), ("extra", report.extra)):
        if names:
            console.print(Text(_printable(f"  {what}: {listed(names)}"), "red"), soft_wrap=True)
    for problem in report.problems:
        console.print(Text(_printable(f"  {problem}"), "red"), soft_wrap=True)


def _printable(text: str) -> str:
    """Escapes control characters in untrusted text from a file."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
