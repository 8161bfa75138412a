"""What a person is told of a server's settings: all of them with their sources, and names that look misspelt."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from services.runtime.settings import (
    PREFIX,
    LoadedSettings,
    ServerSettings,
    limits_of,
    number_text,
    variable_name,
)

_LIKENESS = 0.93
"""Of a misspelt name: one or two letters of it are wrong, missing or too many."""


def misspelt(cls: type[ServerSettings], environment: Mapping[str, str]) -> list[str]:
    """Returns a sentence for each `KLEIN_` variable that nothing here reads but that looks like one that is read.

    Variables that look like none are left alone: stages may share an environment.
    """
    known = [variable_name(field.name) for field in dataclasses.fields(cls)]
    unread = sorted(name for name in environment if name.startswith(PREFIX) and name not in known)
    nearest = {name: difflib.get_close_matches(name, known, n=1, cutoff=_LIKENESS) for name in unread}
    return [
        f"{name} is no setting of this server and is not read; {meant[0]} is one"
        for name, meant in nearest.items()
        if meant
    ]


def describe(loaded: LoadedSettings[Any]) -> str:
    """Returns a table of every setting: variable, value, source, help."""
    fields = dataclasses.fields(loaded.settings)
    rows = [
        (variable_name(field.name), _shown(getattr(loaded.settings, field.name)), loaded.sources[field.name])
        for field in fields
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"{text}  {_help_of(field)}" for text, field in zip(cells, fields, strict=True))


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return number_text(value) if isinstance(value, float) else str(value) or '""'


def _help_of(field: dataclasses.Field[Any]) -> str:
    limits = limits_of(field)
    return f"{field.metadata.get('help', '')}{f' ({limits})' if limits else ''}"
