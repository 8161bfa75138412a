"""Decides how each tensor of a checkpoint is stored, by its dtype and the writer's notes. Torch-free.

The dtype of each tensor decides, never a list of layers: published files differ in what they quantize. What two
layouts could both explain is refused unless a note tells which it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from klein_core.checkpoint.header import StoredTensor
from klein_core.checkpoint.key_mapping import companions_of, is_companion
from klein_core.errors import raise_if_problems
from klein_core.quantization.constants import BLOCK, swizzled_shape
from klein_core.quantization.metadata import (
    FLOAT8,
    FLOAT8_WIDE,
    INT8,
    NVFP4_LINEAR,
    NVFP4_TILED,
    LayerQuant,
    QuantMetadata,
)

_WEIGHT = ".weight"
_SCALE, _SECOND_SCALE, _INPUT_SCALE, _SMOOTHING, _MARKER = (
    ".weight_scale",
    ".weight_scale_2",
    ".input_scale",
    ".pre_quant_scale",
    ".comfy_quant",
)
_CODED: Mapping[str, Collection[str]] = {
    "F8_E4M3": (FLOAT8,),
    "F8_E5M2": (FLOAT8_WIDE,),
    # Bytes can hold any of these; some writers know no other dtype.
    "U8": (NVFP4_TILED, NVFP4_LINEAR, FLOAT8),
    "I8": (INT8,),
}
"""Dtype → the forms whose codes it holds."""
_PLAIN = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class QuantFormat:
    """How one tensor `X.weight` is stored."""

    kind: str
    """`FLOAT8`, `NVFP4_TILED` and so on."""
    shape: tuple[int, int]
    """(rows, columns) of the values, unpacked."""
    companions: Mapping[str, str]
    """`.weight_scale` and so on → the name of the stored tensor."""
    full_precision: bool = False


def find_forms(
    place: Path, tensors: Mapping[str, StoredTensor], notes: QuantMetadata
) -> dict[str, QuantFormat]:
    """Returns tensor name → form, for those that are not plain numbers.

    Args:
        place: the checkpoint, for messages.
        tensors: all that may be read, companions too.
        notes: its writer's; layers by the names in `tensors`, without `.weight`.

    Raises:
        CheckpointError: a scale is missing, extra or of another shape, or how something is stored is not told, is
            told differently than the tensors say, or is not supported. All names are listed.
    """
    problems: dict[str, list[str]] = {}
    forms: dict[str, QuantFormat] = {}
    for name, tensor in tensors.items():
        if is_companion(name):
            if name.rpartition(".")[0] + _WEIGHT not in tensors:
                problems.setdefault("that describe no tensor:", []).append(name)
            continue
        own = {suffix: other for suffix, other in companions_of(name).items() if other in tensors}
        note = notes.layers.get(name.removesuffix(_WEIGHT))
        found = _form(tensor, own if name.endswith(_WEIGHT) else {}, note, notes, tensors)
        if isinstance(found, QuantFormat):
            forms[name] = found
        elif found is not None:
            problems.setdefault(found, []).append(name)
    listed = [layer for layer in notes.layers if layer + _WEIGHT not in tensors]
    problems["noted as quantized but absent:"] = listed
    raise_if_problems(place, problems.items())
    return forms


def _form(
    tensor: StoredTensor,
    companions: Mapping[str, str],
    note: LayerQuant | None,
    notes: QuantMetadata,
    tensors: Mapping[str, StoredTensor],
) -> QuantFormat | str | None:
    """Returns how a tensor is stored, what is wrong with it, or `None` when it is plain numbers."""
    if tensor.dtype not in _CODED:
        if companions or note:
            return "plain numbers with companions or notes of quantized ones:"
        return None
    kind = _kind(tensor, note, notes)
    if kind not in _CODED[tensor.dtype]:
        return kind
    shape = _values_shape(kind, tensor)
    if shape is None:
        return f"of a shape that {kind} cannot have:"
    expected = {_SCALE, _SECOND_SCALE} if "nvfp4" in kind else {_SCALE}
    missing = expected - companions.keys()
    optional = {_INPUT_SCALE, _MARKER} | ({_SMOOTHING} if kind == NVFP4_TILED else set())
    extra = companions.keys() - expected - optional
    if missing or extra:
        which = ", ".join(
            [*(f"without {suffix}" for suffix in missing), *(f"with {suffix}" for suffix in extra)]
        )
        return f"{kind} {which}:"
    wrong = [
        companions[suffix]
        for suffix in companions
        if suffix != _MARKER and not _scale_fits(kind, suffix, shape, tensors[companions[suffix]])
    ]
    if wrong:
        return f"{kind} with scales of another dtype or shape ({', '.join(wrong)}):"
    return QuantFormat(kind, shape, dict(companions), note.full_precision if note else False)


def _kind(tensor: StoredTensor, note: LayerQuant | None, notes: QuantMetadata) -> str:
    """Returns the form that the notes tell, or what is wrong with them."""
    candidates = _CODED[tensor.dtype]
    if note and notes.form and note.form != notes.form:
        return f"noted as {note.form} and as {notes.form}:"
    if notes.layers and not note:
        return "quantized, but not listed in the notes of the checkpoint:"
    told = note.form if note else notes.form
    if told is None:
        # Eight-bit floats have one layout; of the others no tensor tells which it is.
        if tensor.dtype == "U8" or tensor.dtype == "I8":
            return "quantized in a layout that no note of the checkpoint tells:"
        return next(iter(candidates))
    return told if told in candidates else f"{tensor.dtype}, but noted as {told}:"


def _values_shape(kind: str, tensor: StoredTensor) -> tuple[int, int] | None:
    if len(tensor.shape) != 2 or not tensor.element_count:
        return None
    rows, columns = tensor.shape
    if "nvfp4" not in kind:
        return rows, columns
    return None if 2 * columns % BLOCK else (rows, 2 * columns)


def _scale_fits(kind: str, suffix: str, shape: tuple[int, int], scale: StoredTensor) -> bool:
    rows, columns = shape
    if suffix == _SMOOTHING:
        return scale.dtype in _PLAIN and scale.shape == (columns,)
    if suffix != _SCALE:
        return scale.dtype == "F32" and scale.shape in ((), (1,))
    if kind == NVFP4_TILED:
        return scale.dtype in ("F8_E4M3", "U8") and scale.shape == swizzled_shape(rows, columns // BLOCK)
    if kind == NVFP4_LINEAR:
        return scale.dtype in ("F8_E4M3", "U8") and scale.shape == (rows, columns // BLOCK)
    return scale.dtype in _PLAIN and scale.shape in ((), (1,), (rows,), (rows, 1))
