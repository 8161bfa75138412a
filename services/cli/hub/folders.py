"""Where pulled models are kept, and how a whole one is told from the beginnings of one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.cli.errors import CliError
from services.cli.exit_codes import MISUSED
from services.cli.hub.choice import Choice, choose, is_known

RECEIPT = "klein-pull.json"
"""Written last, beside model_index.json: what was pulled from where."""
FOLDER_VARIABLE = "KLEIN_MODELS_FOLDER"


def models_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Returns where models go unless told otherwise: a folder of the user's, the same from everywhere."""
    if environment.get(FOLDER_VARIABLE):
        return Path(environment[FOLDER_VARIABLE]).expanduser()
    data = environment.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "klein" / "models"


def default_folder(choice: Choice) -> Path:
    """Returns the folder that a model is pulled to."""
    return models_folder() / choice.name


def pulled_folder(identifier: str) -> Path | None:
    """Returns the folder of a model that was pulled whole by name, or `None` when none was.

    Raises:
        CliError: this is no model's name and no repository's.
    """
    folder = default_folder(choose(identifier))
    return folder if read_receipt(folder) is not None else None


def find_model(model: str) -> Path:
    """Returns what `--model` means: a folder or file on disk, else the folder of a model pulled by that name.

    Raises:
        CliError: there is neither; for what can be pulled, with the command that does.
    """
    place = Path(model).expanduser()
    if place.exists():
        return place
    if not is_known(model) and not _may_be_repository(model):
        raise CliError(
            f"There is no folder or file {model}.",
            "Give the path of a model, or `pico`, or a model's name: `klein pull --help` tells them.",
            MISUSED,
        )
    pulled = pulled_folder(model)
    if pulled is None:
        what = (
            f"{model} was not pulled yet"
            if is_known(model)
            else f"{model} is no folder here and was not pulled"
        )
        raise CliError(f"{what}.", f"Pull it first: `klein pull {model}`.", MISUSED)
    return pulled


def read_receipt(folder: Path) -> dict[str, Any] | None:
    """Returns what a pulled folder's receipt says; `None` for any other folder."""
    try:
        receipt = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return receipt if isinstance(receipt, dict) else None


def _may_be_repository(model: str) -> bool:
    """Whether a word that names no folder looks like OWNER/REPOSITORY rather than a path."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and not model.endswith("/")
