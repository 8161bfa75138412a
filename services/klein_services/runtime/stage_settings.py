"""Settings that all stages share: the model, its device, and the times that work may take."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klein_core.checkpoint.files import ModelFiles
from klein_core.errors import CheckpointError
from klein_core.model_registry import published_model
from klein_core.pico import WEIGHTS as EMBEDDED_WEIGHTS
from klein_core.quantization.constants import NO_QUANTIZATION, QUANTIZATIONS
from klein_services.runtime.settings import ServerSettings, SettingsError, path_problems, setting

EMBEDDED_MODEL = "pico"
"""The `model_path` that means the model inside the package; a folder of that name is `./pico`."""
_DEVICE = re.compile(r"auto|(cpu|cuda|mps)(:\d{1,4})?")


def quantization_setting() -> Any:
    """Makes the field of the stages whose weights can be quantized while they are loaded."""
    return setting(
        NO_QUANTIZATION,
        help="Format to which plain weights are quantized at load; quantized checkpoints stay as they are",
        choices=QUANTIZATIONS,
    )


@dataclass(frozen=True, kw_only=True)
class StageSettings(ServerSettings):
    """Settings of every stage."""

    model_path: str = setting(
        "pico",
        help="Model's folder in diffusers layout, or one safetensors file; pico is the embedded model",
    )
    weights_path: str = setting(
        "", help="Safetensors file or folder of this stage's own part, instead of the model's"
    )
    variant: str = setting(
        "", help="Name of the published model, such as klein-4b, where there is no model_index.json"
    )
    model_name: str = setting("", help="Name that requests may give; empty takes the model's file name")
    device: str = setting("auto", help="auto, cpu, cuda, cuda:N or mps; auto takes the first GPU there is")
    dtype: str = setting(
        "auto",
        help="Element type of the weights; checkpoint keeps its own, and so does auto but for bf16 VAEs on CUDA",
        choices=("auto", "checkpoint", "bf16", "f16", "f32"),
    )
    threads: int = setting(
        0, help="CPU threads of one operation; 0 is torch's choice", minimum=0, maximum=1024
    )
    watchdog_seconds: float = setting(
        30.0,
        help="Seconds that a step or operation may always take; beyond them and 20 times the expected time the process "
        "ends. 0 turns it off",
        minimum=0,
        maximum=86400,
    )
    receive_timeout_seconds: float = setting(
        30.0, help="Seconds within which a whole request must arrive", minimum=0.01, maximum=3600
    )

    def __post_init__(self) -> None:
        if not self.model_name:
            # The only way to derive a field of a frozen dataclass from others.
            named_path = self.model_path if self._model is not None else self.weights_path
            object.__setattr__(self, "model_name", model_name(named_path))

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not _DEVICE.fullmatch(self.device):
            yield f"KLEIN_DEVICE is {self.device!r}; it must be auto, cpu, cuda, cuda:N or mps"
        if self.variant:
            try:
                published_model(self.variant)
            except CheckpointError as error:
                yield f"KLEIN_VARIANT: {error}"
        if self.model_path != EMBEDDED_MODEL:
            yield from path_problems("model_path", self.model_path)
        yield from path_problems("weights_path", self.weights_path)

    def model_files(self, component: str) -> ModelFiles:
        """Returns the paths of the model's parts; `component` is the one that this stage loads."""
        own = {component: Path(self.weights_path)} if self.weights_path else {}
        return ModelFiles(model=self._model, variant=self.variant, **own)

    @property
    def _model(self) -> Path | None:
        if self.model_path != EMBEDDED_MODEL:
            return Path(self.model_path)
        # With weights of another model, the embedded model's other parts do not apply.
        return None if self.weights_path else EMBEDDED_WEIGHTS


def check_temporary_folder() -> None:
    """Checks that a folder for temporary files can be written: importing torch fails without one.

    Raises:
        SettingsError: there is none.
    """
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise SettingsError(
            f"Stages need a folder for temporary files: {error.strerror}. "
            "Set TMPDIR to a folder that can be written."
        ) from None


def model_name(path: str) -> str:
    """Returns the default name of a model: the name of its folder or file."""
    return Path(path).resolve().name.removesuffix(".safetensors")
