"""Models on this machine: where `--model` finds their parts, where `klein pull` puts them, whether they are whole."""

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
from klein_core.model_registry import published_model
from klein_core.pico import WEIGHTS
from klein_services.cli.errors import CliError, with_period
from klein_services.cli.exit_codes import MISUSED
from klein_services.cli.hub.catalog import Choice, choose, is_known, refuse_named_family
from klein_services.runtime.stage_settings import EMBEDDED_MODEL, model_name

RECEIPT = "klein-pull.json"
"""Written last, next to model_index.json: the model, and the source of each file."""
FOLDER_VARIABLE = "KLEIN_MODELS_FOLDER"
PICO = EMBEDDED_MODEL
COMPONENTS = {"text-encoder": TEXT_ENCODER, "denoiser": TRANSFORMER, "vae-decoder": VAE}
"""Stage → the component of a model that it loads."""
_MODEL_HINT = (
    "--model takes `pico`, a folder in the diffusers layout, a pulled model's name or a safetensors file; "
    "--transformer, --vae, --text-encoder and --tokenizer replace single parts, --variant names the model that "
    "a bare file is from. `klein inspect` shows what a file holds."
)


def model_path(model: str) -> Path:
    """Returns the path of `pico`, or of any other model as `find_model`; raises CliError as that."""
    return WEIGHTS if model == PICO else find_model(model)


def model_files(model: str, parts: Mapping[str, Path], variant: str = "") -> ModelFiles:
    """Returns the path of each part of a model. With `parts`, nothing is taken from pico.

    Args:
        model: as `model_path` takes it.
        parts: component → its own file or folder, instead of the model's.
        variant: name of the published model, when no model_index.json identifies it.

    Raises:
        CliError: the model is neither here nor pulled, a part is not here, or `variant` is no published model.
    """
    if variant:
        try:
            published_model(variant)
        except CheckpointError as error:
            raise CliError(with_period(f"--variant: {error}"), exit_code=MISUSED) from error
    path = None if parts and model == PICO else model_path(model)
    for part in parts.values():
        if not part.exists():
            raise CliError(f"There is no {part}.", _MODEL_HINT, MISUSED)
    return ModelFiles(model=path, variant=variant, **parts)


def require_model(files: ModelFiles) -> str:
    """Checks by configurations and headers that a model's parts are whole and fit each other; returns its name.

    Raises:
        CliError: a part is missing, incomplete or of another model.
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


def models_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Returns the folder of pulled models: `FOLDER_VARIABLE`, else the user's data folder."""
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
        CliError: this is neither a model's name nor a repository's.
    """
    folder = default_folder(choose(identifier))
    return folder if read_receipt(folder) is not None else None


def find_model(model: str) -> Path:
    """Returns the folder or file at the path `model`, else the folder of the model pulled by that name.

    Raises:
        CliError: there is neither; for a model that can be pulled, with the command that does.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    refuse_named_family(model)
    may_be_repository = model.count("/") == 1 and not model.startswith((".", "/", "~")) and model[-1] != "/"
    if not is_known(model) and not may_be_repository:
        raise CliError(
            f"There is no folder or file {model}.",
            "Give the path of a model, or `pico`, or a model's name: `klein pull --help` lists them.",
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
    """Returns the receipt of a pulled folder; `None` for any other folder."""
    try:
        receipt = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return receipt if isinstance(receipt, dict) else None
