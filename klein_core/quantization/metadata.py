"""What a checkpoint says of its own quantization. Torch-free.

Three kinds of writers leave a note, and the layout of four-bit weights is known by it alone: ComfyUI and the models'
authors (`_quantization_metadata` in a file's header, or a tensor `X.comfy_quant` beside `X.weight`), NVIDIA's
ModelOpt (`quantization_config` in config.json, or hf_quant_config.json) and diffusers (`quantization` in the header).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from klein_core.checkpoint.files import Checkpoint
from klein_core.errors import CheckpointError, raise_if_problems
from klein_core.quantization.constants import BLOCK
from klein_core.variants import read_json

FLOAT8 = "fp8"
FLOAT8_WIDE = "fp8 e5m2"
NVFP4_TILED = "nvfp4"
NVFP4_LINEAR = "nvfp4 (ModelOpt)"
INT8 = "int8"

_COMFY_FORMATS: Mapping[str, str] = {
    "float8_e4m3fn": FLOAT8,
    "float8_e5m2": FLOAT8_WIDE,
    "nvfp4": NVFP4_TILED,
    "int8_tensorwise": INT8,
}
_ALGORITHMS: Mapping[str, str] = {"FP8": FLOAT8, "NVFP4": NVFP4_LINEAR, "fp8r": FLOAT8, "nvfp4": NVFP4_LINEAR}
"""ModelOpt's and diffusers' names; diffusers writes ModelOpt's layout."""
_COMFY_HEADER = "_quantization_metadata"
_COMFY_VERSION = "1.0"
_DIFFUSERS_HEADER = "quantization"
_MODELOPT_FILE = "hf_quant_config.json"


@dataclass(frozen=True)
class LayerQuant:
    """How one layer is stored, as its writer says."""

    form: str
    """`FLOAT8` and so on."""
    full_precision: bool = False
    """Whether products of this layer are to be computed in full precision."""


@dataclass(frozen=True)
class QuantMetadata:
    """All that a checkpoint says."""

    layers: Mapping[str, LayerQuant] = field(default_factory=dict)
    """For each layer (a tensor's name without `.weight`) that is listed."""
    form: str | None = None
    """For all quantized layers, of whoever names none."""


def layer_note(place: Path, layer: str, entry: object) -> LayerQuant:
    """Reads ComfyUI's entry on one layer.

    Raises:
        CheckpointError: it is malformed, or asks for something that this library does not do.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("format"), str):
        raise CheckpointError(f"{place}: the quantization of {layer} is {entry!r}; it must have a format")
    known = {"format", "full_precision_matrix_mult", "group_size"}
    form, full_precision = _COMFY_FORMATS.get(entry["format"]), entry.get("full_precision_matrix_mult", False)
    if form is None:
        supported = ", ".join(_COMFY_FORMATS)
        raise CheckpointError(f"{place}: {layer} is stored as {entry['format']}; supported are {supported}")
    # What changes the meaning of the stored numbers (a rotation, say) comes under a name of its own.
    unknown = [key for key, value in entry.items() if key not in known and value is not False]
    if unknown or not isinstance(full_precision, bool) or entry.get("group_size") not in (None, BLOCK):
        raise CheckpointError(f"{place}: the quantization of {layer} is {entry}, which is not supported")
    return LayerQuant(form, full_precision)


def comfy_notes(place: Path, metadata: Mapping[str, str]) -> dict[str, LayerQuant]:
    """Reads ComfyUI's table in a file's header; empty when there is none."""
    if _COMFY_HEADER not in metadata:
        return {}
    table = _parsed(place, _COMFY_HEADER, metadata[_COMFY_HEADER])
    version, layers = table.get("format_version", _COMFY_VERSION), table.get("layers")
    if version != _COMFY_VERSION or not isinstance(layers, dict):
        raise CheckpointError(
            f"{place}: {_COMFY_HEADER} is of version {version!r}; supported is {_COMFY_VERSION!r} with layers"
        )
    return {layer: layer_note(place, layer, entry) for layer, entry in layers.items()}


def parsed_marker(place: Path, layer: str, content: bytes) -> LayerQuant:
    """Reads the content of a tensor `X.comfy_quant`."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{place}: {layer}.comfy_quant is not text") from None
    return layer_note(place, layer, _parsed(place, f"{layer}.comfy_quant", text))


def general_form(place: Path, metadata: Mapping[str, str]) -> str | None:
    """Returns the one form of all quantized layers that a header or a configuration file beside it names.

    Raises:
        CheckpointError: two of them contradict each other, or one names a form that this library does not read.
    """
    told = {source: _form(place, source, name) for source, name in _algorithms(place, metadata).items()}
    if len(set(told.values())) > 1:
        listed = ", ".join(f"{source} says {form}" for source, form in told.items())
        raise CheckpointError(f"{place} contradicts itself: {listed}")
    return next(iter(told.values()), None)


def configured_algorithm(path: Path, config: Mapping[str, Any]) -> object:
    """Returns what a component's configuration calls its quantization; `None` when it has none.

    Raises:
        CheckpointError: it is not ModelOpt's.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if method != "modelopt":
        raise CheckpointError(f"{path}: quantization_config is of {method!r}; supported is 'modelopt'")
    return settings.get("quant_algo", settings.get("quant_type"))


def _algorithms(place: Path, metadata: Mapping[str, str]) -> dict[str, object]:
    """Returns who names a quantization → its name there."""
    told: dict[str, object] = {}
    if _DIFFUSERS_HEADER in metadata:
        told["the header"] = metadata[_DIFFUSERS_HEADER]
    if (place / _MODELOPT_FILE).is_file():
        settings = read_json(place / _MODELOPT_FILE).get("quantization")
        told[_MODELOPT_FILE] = settings.get("quant_algo") if isinstance(settings, dict) else settings
    config = _configured(place)
    if config is not None:
        told["config.json"] = config
    return told


def _configured(folder: Path) -> object:
    """Returns what config.json names; `None` when it says nothing."""
    path = folder / "config.json"
    return configured_algorithm(path, read_json(path)) if path.is_file() else None


def _form(place: Path, source: str, name: object) -> str:
    form = _ALGORITHMS.get(name) if isinstance(name, str) else None
    if form is None:
        raise CheckpointError(f"{place}: {source} says {name!r}; supported are {', '.join(_ALGORITHMS)}")
    return form


def _parsed(place: Path, what: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{place}: {what} is not JSON") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{place}: {what} must be a JSON object, not {type(value).__name__}")
    return value


MARKER = ".comfy_quant"
_MAXIMUM_MARKER_BYTES = 4096
# Prefixes that a header's table of layers may have or lack, whatever the file's own names do.
_TABLE_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.")


def read_quant_metadata(checkpoint: Checkpoint, names: Collection[str], prefix: str) -> QuantMetadata:
    """Reads all notes on the tensors `names`, which begin with `prefix`; no weights.

    Raises:
        CheckpointError: a note is malformed, unsupported, or contradicts another.
    """
    metadata: dict[str, str] = {}
    layers: dict[str, LayerQuant] = {}
    for path in sorted({checkpoint.files[name] for name in names}):
        header = checkpoint.header(path)
        metadata |= header.metadata
        for layer, note in comfy_notes(path, header.metadata).items():
            own = _own_name(layer, checkpoint.files, prefix)
            # A file may hold other components, and layers that this network does not need.
            if own + ".weight" in names or own + ".weight" not in checkpoint.files:
                layers[own] = note
    for layer, note in _read_markers(checkpoint, names).items():
        if layers.setdefault(layer, note) != note:
            raise CheckpointError(f"{checkpoint.place}: {layer}{MARKER} contradicts the header: {note}")
    return QuantMetadata(layers, general_form(checkpoint.place, metadata))


def _own_name(layer: str, files: Collection[str], prefix: str) -> str:
    """Returns a layer of the header's table as the checkpoint's tensors name it."""
    bare = {layer.removeprefix(other) for other in _TABLE_PREFIXES}
    candidates = [layer, prefix + layer, *(prefix + name for name in bare), *bare]
    return next((name for name in candidates if name + ".weight" in files), layer)


def _read_markers(checkpoint: Checkpoint, names: Collection[str]) -> dict[str, LayerQuant]:
    markers = [name for name in names if name.endswith(MARKER)]
    entries = {name: checkpoint.entry(name) for name in markers}
    wrong = [
        name
        for name, entry in entries.items()
        if entry.dtype != "U8" or len(entry.shape) != 1 or entry.byte_count > _MAXIMUM_MARKER_BYTES
    ]
    raise_if_problems(checkpoint.place, [(f"not at most {_MAXIMUM_MARKER_BYTES} bytes of text:", wrong)])
    layers = {name: name.removesuffix(MARKER) for name in markers}
    return {
        layer: parsed_marker(checkpoint.place, layer, checkpoint.content(name))
        for name, layer in layers.items()
    }
