"""Quantization metadata that checkpoints carry. Torch-free.

Three kinds of writers leave it, and 4-bit layouts can be recognized by nothing else: ComfyUI and the models' authors
(`_quantization_metadata` in a file's header, or a tensor `X.comfy_quant` next to `X.weight`), NVIDIA's ModelOpt
(`quantization_config` in config.json, or hf_quant_config.json) and diffusers (`quantization` in the header).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from klein_core.checkpoint.files import Checkpoint
from klein_core.errors import CheckpointError, raise_if_problems
from klein_core.quantization.constants import (
    BLOCK,
    FLOAT8,
    FLOAT8_E5M2,
    INT8,
    MARKER,
    NVFP4_LINEAR,
    NVFP4_TILED,
    WEIGHT,
)
from klein_core.variants import read_json

_COMFY_FORMATS: Mapping[str, str] = {
    "float8_e4m3fn": FLOAT8,
    "float8_e5m2": FLOAT8_E5M2,
    "nvfp4": NVFP4_TILED,
    "int8_tensorwise": INT8,
}
_COMFY_KEYS = frozenset({"format", "full_precision_matrix_mult", "group_size"})
_COMFY_HEADER = "_quantization_metadata"
_COMFY_VERSION = "1.0"
_ALGORITHMS: Mapping[str, str] = {"FP8": FLOAT8, "NVFP4": NVFP4_LINEAR, "fp8r": FLOAT8, "nvfp4": NVFP4_LINEAR}
"""ModelOpt's and diffusers' names; diffusers writes ModelOpt's layout."""
_DIFFUSERS_HEADER = "quantization"
_MODELOPT_FILE = "hf_quant_config.json"
_MAXIMUM_MARKER_BYTES = 4096
# Prefixes that a header's table of layers may have or lack, whatever the file's own names do.
_TABLE_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.")


@dataclass(frozen=True)
class LayerQuant:
    """The format of one layer, as its writer lists it."""

    kind: str
    """`constants.FLOAT8` and so on."""
    full_precision: bool = False
    """Whether products of this layer are to be computed in full precision."""


@dataclass(frozen=True)
class QuantMetadata:
    """All that the writer of a checkpoint left about its quantization."""

    layers: Mapping[str, LayerQuant] = field(default_factory=dict)
    """Layer (a tensor's name without `.weight`) → its format, for the layers that the writer lists."""
    kind: str | None = None
    """Format of every quantized layer, when the writer does not list layers."""


def read_quant_metadata(checkpoint: Checkpoint, names: Collection[str], prefix: str) -> QuantMetadata:
    """Reads all metadata about the tensors `names`, which begin with `prefix`; no weights.

    Raises:
        CheckpointError: an entry is malformed, unsupported, or contradicts another.
    """
    metadata: dict[str, str] = {}
    layers: dict[str, LayerQuant] = {}
    for path in sorted({checkpoint.files[name] for name in names}):
        header = checkpoint.header(path)
        metadata |= header.metadata
        for layer, listed in _comfy_layers(path, header.metadata).items():
            # Writers of the table add prefixes to the names of the tensors, or leave them out.
            bare = {layer.removeprefix(other) for other in _TABLE_PREFIXES}
            candidates = [layer, prefix + layer, *(prefix + name for name in bare), *bare]
            own = next((name for name in candidates if name + WEIGHT in checkpoint.files), layer)
            # A file may hold other components, and layers that this network does not need.
            if own + WEIGHT in names or own + WEIGHT not in checkpoint.files:
                layers[own] = listed
    for layer, marked in _read_markers(checkpoint, names).items():
        if layers.setdefault(layer, marked) != marked:
            raise CheckpointError(f"{checkpoint.path}: {layer}{MARKER} contradicts the header: {marked}")
    return QuantMetadata(layers, _common_format(checkpoint.path, metadata))


def configured_algorithm(path: Path, config: Mapping[str, Any]) -> object:
    """Returns the quantization algorithm that a component's configuration names; `None` without one.

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


def _comfy_layers(path: Path, metadata: Mapping[str, str]) -> dict[str, LayerQuant]:
    """Reads ComfyUI's table in a file's header; empty when there is none."""
    if _COMFY_HEADER not in metadata:
        return {}
    table = _json_object(path, _COMFY_HEADER, metadata[_COMFY_HEADER])
    version, layers = table.get("format_version", _COMFY_VERSION), table.get("layers")
    if version != _COMFY_VERSION or not isinstance(layers, dict):
        raise CheckpointError(
            f"{path}: {_COMFY_HEADER} is of version {version!r}; supported is {_COMFY_VERSION!r} with layers"
        )
    return {layer: _comfy_layer(path, layer, entry) for layer, entry in layers.items()}


def _comfy_layer(path: Path, layer: str, entry: object) -> LayerQuant:
    """Checks ComfyUI's entry on one layer."""
    if not isinstance(entry, dict) or not isinstance(entry.get("format"), str):
        raise CheckpointError(f"{path}: the quantization of {layer} is {entry!r}; it must have a format")
    kind, full_precision = _COMFY_FORMATS.get(entry["format"]), entry.get("full_precision_matrix_mult", False)
    if kind is None:
        supported = ", ".join(_COMFY_FORMATS)
        raise CheckpointError(f"{path}: {layer} is stored as {entry['format']}; supported are {supported}")
    # A key of another name can change the meaning of the stored numbers, for example by a rotation.
    unknown = [key for key, value in entry.items() if key not in _COMFY_KEYS and value is not False]
    if unknown or not isinstance(full_precision, bool) or entry.get("group_size") not in (None, BLOCK):
        raise CheckpointError(f"{path}: the quantization of {layer} is {entry}, which is not supported")
    return LayerQuant(kind, full_precision)


def _read_markers(checkpoint: Checkpoint, names: Collection[str]) -> dict[str, LayerQuant]:
    """Reads the tensors `X.comfy_quant`, each of which holds the JSON text of one entry."""
    entries = {name: checkpoint.entry(name) for name in names if name.endswith(MARKER)}
    wrong = [
        name
        for name, entry in entries.items()
        if entry.dtype != "U8" or len(entry.shape) != 1 or entry.byte_count > _MAXIMUM_MARKER_BYTES
    ]
    raise_if_problems(checkpoint.path, [(f"not at most {_MAXIMUM_MARKER_BYTES} bytes of text:", wrong)])
    layers: dict[str, LayerQuant] = {}
    for name in entries:
        try:
            text = checkpoint.content(name).decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{checkpoint.path}: {name} is not text") from None
        layer = name.removesuffix(MARKER)
        layers[layer] = _comfy_layer(checkpoint.path, layer, _json_object(checkpoint.path, name, text))
    return layers


def _common_format(path: Path, metadata: Mapping[str, str]) -> str | None:
    """Returns the one format of all quantized layers that a header or a configuration file next to it names.

    Raises:
        CheckpointError: two of them contradict each other, or one names a format that is not supported.
    """
    algorithms: dict[str, object] = {}
    if _DIFFUSERS_HEADER in metadata:
        algorithms["the header"] = metadata[_DIFFUSERS_HEADER]
    if (path / _MODELOPT_FILE).is_file():
        settings = read_json(path / _MODELOPT_FILE).get("quantization")
        algorithms[_MODELOPT_FILE] = settings.get("quant_algo") if isinstance(settings, dict) else settings
    config = path / "config.json"
    configured = configured_algorithm(config, read_json(config)) if config.is_file() else None
    if configured is not None:
        algorithms[config.name] = configured

    kinds: dict[str, str] = {}
    for source, algorithm in algorithms.items():
        if not isinstance(algorithm, str) or algorithm not in _ALGORITHMS:
            supported = ", ".join(_ALGORITHMS)
            raise CheckpointError(f"{path}: {source} names {algorithm!r}; supported are {supported}")
        kinds[source] = _ALGORITHMS[algorithm]
    if len(set(kinds.values())) > 1:
        contradiction = ", ".join(f"{source} names {kind}" for source, kind in kinds.items())
        raise CheckpointError(f"{path} contradicts itself: {contradiction}")
    return next(iter(kinds.values()), None)


def _json_object(path: Path, source: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: {source} is not JSON") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {source} must be a JSON object, not {type(value).__name__}")
    return value
