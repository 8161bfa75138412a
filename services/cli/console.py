"""Where messages to people go."""

from __future__ import annotations

from rich.console import Console


def messages() -> Console:
    """Returns the console for progress and errors: standard error, so that output can be piped."""
    return Console(stderr=True)
