"""Training state on disk: written whole or not at all, so that a run can go on after any interruption."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a training state beside its place and moves it there in one step."""
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
