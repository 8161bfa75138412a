"""The model that a command is told: where its parts lie on this machine, and whether they are whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from klein_core.checkpoint.config import read_variant
from klein_core.checkpoint.files import ModelFiles
from klein_core.checkpoint.inspect import check_component
from klein_core.checkpoint.key_mapping import TEXT_ENCODER, TRANSFORMER, VAE
from klein_core.errors import CheckpointError
from klein_core.pico import WEIGHTS
from klein_services.cli.errors import CliError, with_period
from klein_services.cli.exit_codes import MISUSED
from klein_services.cli.hub.catalog import Choice, choose, is_known
from klein_services.runtime.settings import EMBEDDED_MODEL, model_name

PICO = EMBEDDED_MODEL
COMPONENTS = {"text-encoder": TEXT_ENCODER, "denoiser": TRANSFORMER, "vae-decoder": VAE}
"""Stage → the part of a model that it loads."""
_MODEL_HINT = (
    "--model takes `pico`, a folder in the diffusers layout, a pulled model's name or a safetensors file; "
    "--transformer, --vae, --text-encoder and --tokenizer take parts of their own, --variant tells which model "
    "a bare file is. `klein inspect` shows what a file holds."
)


def find_place(model: str) -> Path:
    """Returns where `pico` or whatever else `--model` takes lies; raises CliError as `find_model`."""
    return WEIGHTS if model == PICO else find_model(model)


def model_files(model: str, parts: Mapping[str, Path], variant: str = "") -> ModelFiles:
    """Returns where each part of a model lies; parts of one's own are no parts of pico.

    Args:
        model: as `find_place` takes it.
        parts: component → its own file or folder, instead of the model's.
        variant: which published model it is, where no model_index.json tells.

    Raises:
        CliError: the model is neither here nor pulled, or a part is not here.
    """
    place = None if parts and model == PICO else find_place(model)
    for path in parts.values():
        if not path.exists():
            raise CliError(f"There is no {path}.", _MODEL_HINT, MISUSED)
    return ModelFiles(model=place, variant=variant, **parts)


def require_model(files: ModelFiles) -> str:
    """Checks by configurations and headers that a model's parts are whole and fit each other; returns its name.

    Raises:
        CliError: they are not or do not.
    """
    try:
        read_variant(files)
        for component in COMPONENTS.values():
            check_component(component, files)
        if not files.tokenizer_folder.is_dir():
            raise CheckpointError(f"{files.tokenizer_folder} is missing")
    except CheckpointError as error:
        raise CliError(with_period(f"The model cannot be used: {error}"), _MODEL_HINT) from error
    return PICO if files.model == WEIGHTS else model_name(str(files.model or files.path(TRANSFORMER)))


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
