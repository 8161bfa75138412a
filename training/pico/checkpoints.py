"""Training state on disk, written whole or not at all, and the progress lines of training."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a training state to a temporary file in the same folder, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def load_state(path: Path) -> dict[str, Any] | None:
    """Returns a training state that `save_state` wrote, or None where there is none yet."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def report(line: str) -> None:
    """Prints one line of progress and flushes it, also when stdout is a file."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
