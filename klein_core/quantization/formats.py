"""Formats of a checkpoint's quantized tensors, by their dtypes and the writer's metadata. Torch-free.

The dtype of each tensor decides, never a list of layers: published files differ in what they quantize. A tensor that
fits two formats is rejected unless the metadata names one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from klein_core.checkpoint.header import PLAIN_DTYPES, StoredTensor
from klein_core.errors import raise_if_problems
from klein_core.quantization.constants import (
    BLOCK,
    FLOAT8,
    FLOAT8_E5M2,
    INPUT_SCALE,
    INT8,
    MARKER,
    NVFP4_LINEAR,
    NVFP4_TILED,
    SCALE,
    SECOND_SCALE,
    SMOOTHING,
    WEIGHT,
    companions_of,
    is_companion,
    swizzled_shape,
)
from klein_core.quantization.metadata import LayerQuant, QuantMetadata

_KINDS: Mapping[str, Collection[str]] = {
    "F8_E4M3": (FLOAT8,),
    "F8_E5M2": (FLOAT8_E5M2,),
    # Some writers have no other dtype than bytes.
    "U8": (NVFP4_TILED, NVFP4_LINEAR, FLOAT8),
    "I8": (INT8,),
}
"""Dtype → the formats whose codes it can hold."""
_FOUR_BIT = (NVFP4_TILED, NVFP4_LINEAR)


@dataclass(frozen=True)
class QuantFormat:
    """The format of one tensor `X.weight`."""

    kind: str
    """`constants.FLOAT8`, `constants.NVFP4_TILED` and so on."""
    shape: tuple[int, int]
    """(rows, columns) of the values, unpacked."""
    companions: Mapping[str, str]
    """`.weight_scale` and so on → the name of the stored tensor."""
    full_precision: bool = False
    """Whether products with this matrix are to be computed in full precision."""


def find_formats(
    path: Path, tensors: Mapping[str, StoredTensor], metadata: QuantMetadata
) -> dict[str, QuantFormat]:
    """Returns tensor name → format, for those that are not plain numbers.

    Args:
        path: the checkpoint, for messages.
        tensors: all that may be read, companions included.
        metadata: its writer's; layers by the names in `tensors`, without `.weight`.

    Raises:
        CheckpointError: a scale is missing, extra or of another shape, or a format is unknown, contradicts its
            tensor, or is not supported. All names are listed.
    """
    problems: dict[str, list[str]] = {}
    formats: dict[str, QuantFormat] = {}
    for name, tensor in tensors.items():
        if is_companion(name):
            if name.rpartition(".")[0] + WEIGHT not in tensors:
                problems.setdefault("that describe no tensor:", []).append(name)
            continue
        own = {suffix: other for suffix, other in companions_of(name).items() if other in tensors}
        layer = metadata.layers.get(name.removesuffix(WEIGHT))
        found = _format(tensor, own if name.endswith(WEIGHT) else {}, layer, metadata, tensors)
        if isinstance(found, QuantFormat):
            formats[name] = found
        elif found is not None:
            problems.setdefault(found, []).append(name)
    absent = [layer for layer in metadata.layers if layer + WEIGHT not in tensors]
    problems["listed as quantized but absent:"] = absent
    raise_if_problems(path, problems.items())
    return formats


def _format(
    tensor: StoredTensor,
    companions: Mapping[str, str],
    layer: LayerQuant | None,
    metadata: QuantMetadata,
    tensors: Mapping[str, StoredTensor],
) -> QuantFormat | str | None:
    """Returns a tensor's format, what is wrong with it, or `None` when it is plain numbers."""
    if tensor.dtype not in _KINDS:
        if companions or layer:
            return "plain numbers with scales or metadata of quantized ones:"
        return None
    kind = _kind(tensor, layer, metadata)
    if kind not in _KINDS[tensor.dtype]:
        return kind
    packing = 2 if kind in _FOUR_BIT else 1
    if (
        len(tensor.shape) != 2
        or not tensor.element_count
        or (kind in _FOUR_BIT and 2 * tensor.shape[1] % BLOCK)
    ):
        return f"of a shape that {kind} cannot have:"
    shape = (tensor.shape[0], packing * tensor.shape[1])
    required = {SCALE, SECOND_SCALE} if kind in _FOUR_BIT else {SCALE}
    optional = {INPUT_SCALE, MARKER} | ({SMOOTHING} if kind == NVFP4_TILED else set())
    missing = [f"without {suffix}" for suffix in required - companions.keys()]
    extra = [f"with {suffix}" for suffix in companions.keys() - required - optional]
    if missing or extra:
        return f"{kind} {', '.join([*missing, *extra])}:"
    wrong = [
        companion
        for suffix, companion in companions.items()
        if suffix != MARKER and not _scale_fits(kind, suffix, shape, tensors[companion])
    ]
    if wrong:
        return f"{kind} with scales of another dtype or shape ({', '.join(wrong)}):"
    return QuantFormat(kind, shape, dict(companions), layer.full_precision if layer else False)


def _kind(tensor: StoredTensor, layer: LayerQuant | None, metadata: QuantMetadata) -> str:
    """Returns a quantized tensor's format, or what is wrong with its metadata."""
    candidates = _KINDS[tensor.dtype]
    if layer and metadata.kind and layer.kind != metadata.kind:
        return f"listed as {layer.kind} and as {metadata.kind}:"
    if metadata.layers and not layer:
        return "quantized, but not listed in the checkpoint's metadata:"
    named = layer.kind if layer else metadata.kind
    if named is None:
        # Eight-bit floats have one layout; the others cannot be recognized by dtype and shape.
        if tensor.dtype in ("U8", "I8"):
            return "quantized in a format that the checkpoint's metadata does not name:"
        return next(iter(candidates))
    return named if named in candidates else f"{tensor.dtype}, but listed as {named}:"


def _scale_fits(kind: str, suffix: str, shape: tuple[int, int], scale: StoredTensor) -> bool:
    rows, columns = shape
    if suffix == SMOOTHING:
        return scale.dtype in PLAIN_DTYPES and scale.shape == (columns,)
    if suffix != SCALE:
        return scale.dtype == "F32" and scale.shape in ((), (1,))
    if kind == NVFP4_TILED:
        return scale.dtype in ("F8_E4M3", "U8") and scale.shape == swizzled_shape(rows, columns // BLOCK)
    if kind == NVFP4_LINEAR:
        return scale.dtype in ("F8_E4M3", "U8") and scale.shape == (rows, columns // BLOCK)
    return scale.dtype in PLAIN_DTYPES and scale.shape in ((), (1,), (rows,), (rows, 1))
