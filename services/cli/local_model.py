"""The model that a command is told: where its parts lie on this machine, and whether they are whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from klein_core.checkpoint.inspection import check_component
from klein_core.checkpoint.layouts import TEXT_ENCODER, TRANSFORMER, VAE
from klein_core.checkpoint.model_files import ModelFiles
from klein_core.checkpoint_config import read_variant
from klein_core.errors import CheckpointError
from klein_core.pico.location import WEIGHTS
from services.cli.errors import CliError, with_period
from services.cli.exit_codes import MISUSED
from services.cli.hub.folders import find_model
from services.runtime.settings import EMBEDDED_MODEL, model_name

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
    return PICO if files.model == WEIGHTS else model_name(str(files.model or files.place(TRANSFORMER)))
