"""Report of settings for operators: a table of them, and warnings about misspelled variables."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from klein_services.runtime.settings import (
    PREFIX,
    LoadedSettings,
    ProcessSettings,
    limits_of,
    number_text,
    variable_name,
)

_LIKENESS = 0.93
"""Similarity of a misspelled name: one or two of its letters are wrong, missing or too many."""


def misspelled(cls: type[ProcessSettings], environment: Mapping[str, str]) -> list[str]:
    """Returns a sentence for each `KLEIN_` variable that is not a setting of this class but looks like one.

    Other variables are not reported: the stages may share an environment.
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
    rows: list[tuple[str, str, str]] = []
    helps: list[str] = []
    for field in dataclasses.fields(loaded.settings):
        value, limits = getattr(loaded.settings, field.name), limits_of(field)
        if isinstance(value, bool):
            text = "true" if value else "false"
        else:
            text = number_text(value) if isinstance(value, float) else str(value) or '""'
        rows.append((variable_name(field.name), text, loaded.sources[field.name]))
        helps.append(f"{field.metadata.get('help', '')}{f' ({limits})' if limits else ''}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"{text}  {help_text}" for text, help_text in zip(cells, helps, strict=True))
