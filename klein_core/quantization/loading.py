"""Reads quantized tensors of a checkpoint as the weights of a network, and quantizes plain ones on their way in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from klein_core.checkpoint.files import Checkpoint
from klein_core.checkpoint.key_mapping import Layout, TensorSlice, is_companion
from klein_core.checkpoint.reader import Reader
from klein_core.errors import raise_if_problems
from klein_core.quantization import constants
from klein_core.quantization.constants import NO_QUANTIZATION
from klein_core.quantization.formats import QuantFormat, find_forms
from klein_core.quantization.fp8 import Float8Weight, Int8Weight, is_finite
from klein_core.quantization.metadata import (
    FLOAT8,
    FLOAT8_WIDE,
    INT8,
    MARKER,
    NVFP4_LINEAR,
    NVFP4_TILED,
    read_quant_metadata,
)
from klein_core.quantization.nvfp4 import Float4Weight
from klein_core.quantization.quantized_weight import QuantizedWeight

_MADE: Mapping[str, type[Float8Weight] | type[Int8Weight]] = MappingProxyType(
    {constants.FLOAT8: Float8Weight, constants.INT8: Int8Weight}
)


class QuantizedLoader:
    """The loader's `QuantizedWeights`: everything of a checkpoint that is not, or is not to stay, plain numbers."""

    def __init__(
        self, forms: Mapping[str, QuantFormat], quantization: str, quantizable: Callable[[str], bool]
    ) -> None:
        self._forms = forms
        self._quantize = _MADE.get(quantization)
        self._quantizable = quantizable

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        layout: Layout,
        *,
        quantization: str = NO_QUANTIZATION,
        quantizable: Callable[[str], bool] = lambda parameter: False,
        ignorable: Callable[[str], bool] = lambda name: False,
    ) -> QuantizedLoader:
        """Reads headers and notes, no weights.

        Args:
            quantization: one of `constants.QUANTIZATIONS`; has no effect on weights that are quantized already.
            quantizable: tells parameters of the network that it may quantize.
            ignorable: tells checkpoint names that are not needed.

        Raises:
            CheckpointError: how a tensor is stored is not told, told twice, or not supported. The message lists the
                names.
        """
        names = {name for name in checkpoint.files if layout.owns(name) and not ignorable(name)}
        notes = read_quant_metadata(checkpoint, names, layout.prefix)
        forms = find_forms(checkpoint.place, {name: checkpoint.entry(name) for name in names}, notes)
        # A suite may have one part's file quantized and be told to quantize the other: what is quantized stays so.
        return cls(forms, NO_QUANTIZATION if forms else quantization, quantizable)

    def is_companion(self, name: str) -> bool:
        return is_companion(name)

    def describes(self, name: str) -> bool:
        return name in self._forms

    def shape(self, name: str, checkpoint: Checkpoint) -> tuple[int, ...]:
        """Returns the shape of what a stored tensor stands for."""
        return self._forms[name].shape if name in self._forms else checkpoint.entry(name).shape

    def takes(self, parameter: str, pieces: tuple[TensorSlice, ...], checkpoint: Checkpoint) -> bool:
        if self._quantize is not None and self._quantizable(parameter):
            return True
        return any(piece.name in self._forms for piece in pieces)

    def needs(self, pieces: tuple[TensorSlice, ...], checkpoint: Checkpoint) -> Collection[str]:
        forms = [self._forms[piece.name] for piece in pieces if piece.name in self._forms]
        return {piece.name for piece in pieces} | {
            name for form in forms for suffix, name in form.companions.items() if suffix != MARKER
        }

    def load(
        self, shape: torch.Size, pieces: tuple[TensorSlice, ...], reader: Reader, dtype: torch.dtype
    ) -> QuantizedWeight | Tensor:
        """Reads one parameter; plain numbers where pieces of several forms make it, which nothing can hold as one."""
        forms = [self._forms.get(piece.name) for piece in pieces]
        if _make_one(forms):
            parts = [self._stored(piece, reader, dtype) for piece in pieces]
            return parts[0] if len(parts) == 1 else type(parts[0]).stacked(parts)
        dense = self._dense(shape, pieces, reader, dtype)
        return dense if self._quantize is None else self._quantize.of(dense)

    def _dense(
        self, shape: torch.Size, pieces: tuple[TensorSlice, ...], reader: Reader, dtype: torch.dtype
    ) -> Tensor:
        dense = torch.empty(shape, dtype=dtype, device=reader.device)
        row = 0
        for piece in pieces:
            count = len(piece.row_range(self.shape(piece.name, reader.checkpoint)[0]))
            target = dense[row : row + count]
            if piece.name in self._forms:
                target.copy_(self._stored(piece, reader, dtype).dense(dtype))
            else:
                reader.copy(piece, target)
            row += count
        return dense

    def _stored(self, piece: TensorSlice, reader: Reader, dtype: torch.dtype) -> QuantizedWeight:
        form = self._forms[piece.name]
        weight = _read(piece.name, form, reader)
        weight.dtype, weight.full_precision = dtype, form.full_precision
        rows = piece.row_range(form.shape[0])
        return weight if len(rows) == form.shape[0] else weight.cut(rows.start, rows.stop)


def _make_one(forms: Sequence[QuantFormat | None]) -> bool:
    """Whether tensors stored in these forms can be rows of one quantized weight."""
    kinds = {form.kind if form else None for form in forms}
    is_smoothed = any(form and ".pre_quant_scale" in form.companions for form in forms)
    return len(kinds) == 1 and None not in kinds and not (is_smoothed and len(forms) > 1)


def _read(name: str, form: QuantFormat, reader: Reader) -> QuantizedWeight:
    """Reads one stored tensor and its scales, whole."""
    values = reader.read(name)
    scales = {suffix: reader.read(other) for suffix, other in form.companions.items() if suffix != MARKER}
    raise_if_problems(
        reader.checkpoint.place,
        [
            (
                "not finite:",
                [form.companions[suffix] for suffix, scale in scales.items() if not _is_finite(scale)],
            )
        ],
    )
    scale, input_scale = scales[".weight_scale"], scales.get(".input_scale")
    if form.kind in (FLOAT8, FLOAT8_WIDE):
        element = torch.float8_e4m3fn if form.kind == FLOAT8 else torch.float8_e5m2
        raise_if_problems(
            reader.checkpoint.place, [("not finite:", [] if is_finite(values, element) else [name])]
        )
        return Float8Weight(values, scale, input_scale, element=element)
    if form.kind == NVFP4_TILED:
        weight = Float4Weight(values, scale, scales[".weight_scale_2"], input_scale)
        if ".pre_quant_scale" in scales:
            weight.smoothing = scales[".pre_quant_scale"].float()
        return weight
    if form.kind == NVFP4_LINEAR:
        return Float4Weight.from_linear(values, scale, scales[".weight_scale_2"], input_scale)
    if form.kind == INT8:
        return Int8Weight(values, scale)
    raise AssertionError(form.kind)


def _is_finite(scale: Tensor) -> bool:
    return bool(scale.float().isfinite().all())
