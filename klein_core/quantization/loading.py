"""Loader of parameters from plain and quantized tensors; quantizes plain ones on request."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from klein_core.checkpoint.component import Component
from klein_core.checkpoint.files import Checkpoint
from klein_core.checkpoint.key_mapping import TensorSlice
from klein_core.checkpoint.tensor_reader import TensorReader
from klein_core.errors import raise_if_problems
from klein_core.quantization.constants import (
    FLOAT8,
    FLOAT8_E5M2,
    INPUT_SCALE,
    INT8,
    MARKER,
    NO_QUANTIZATION,
    NVFP4_LINEAR,
    NVFP4_TILED,
    SCALE,
    SECOND_SCALE,
    SMOOTHING,
)
from klein_core.quantization.formats import QuantFormat, find_formats
from klein_core.quantization.fp8 import Float8Weight, Int8Weight, is_finite
from klein_core.quantization.metadata import read_quant_metadata
from klein_core.quantization.nvfp4 import Float4Weight
from klein_core.quantization.quantized_weight import QuantizedWeight

_QUANTIZERS: Mapping[str, Callable[[Tensor], QuantizedWeight]] = MappingProxyType(
    {FLOAT8: Float8Weight.of, INT8: Int8Weight.of}
)
_NO_FORMATS: Mapping[str, QuantFormat] = MappingProxyType({})


class QuantizedLoader:
    """Reads the parameters of one component, whatever its checkpoint stores them as.

    Args:
        formats: stored tensor → its format, for those that are quantized.
        quantization: what plain weights become, one of `constants.QUANTIZATIONS`.
        quantizable: whether a parameter of the network may be quantized while it is loaded.
    """

    def __init__(
        self,
        formats: Mapping[str, QuantFormat] = _NO_FORMATS,
        quantization: str = NO_QUANTIZATION,
        quantizable: Callable[[str], bool] = lambda parameter: False,
    ) -> None:
        self._formats = formats
        self._quantize = _QUANTIZERS.get(quantization)
        self._quantizable = quantizable

    @classmethod
    def of(
        cls,
        component: Component,
        quantization: str = NO_QUANTIZATION,
        quantizable: Callable[[str], bool] = lambda parameter: False,
    ) -> QuantizedLoader:
        """Finds the formats of a component's tensors from headers and metadata; reads no weights.

        `quantization` has no effect on a checkpoint that is quantized already: a model may have one component
        quantized in its files while the setting asks to quantize the others.

        Raises:
            CheckpointError: the format of a tensor is unknown, contradictory or not supported. The message lists
                the names.
        """
        checkpoint = component.checkpoint
        names = {
            name
            for name in checkpoint.files
            if component.layout.owns(name) and not component.is_unneeded(name)
        }
        metadata = read_quant_metadata(checkpoint, names, component.layout.prefix)
        formats = find_formats(checkpoint.path, {name: checkpoint.entry(name) for name in names}, metadata)
        return cls(formats, NO_QUANTIZATION if formats else quantization, quantizable)

    def is_quantized(self, name: str) -> bool:
        """Whether a stored tensor is quantized; its dtype was checked with its format."""
        return name in self._formats

    def shape(self, name: str, checkpoint: Checkpoint) -> tuple[int, ...]:
        """Returns the shape of a stored tensor's values, unpacked."""
        return self._formats[name].shape if name in self._formats else checkpoint.entry(name).shape

    def companions(self, name: str) -> Collection[str]:
        """Returns the stored tensors that are read along with a quantized one: its scales."""
        if name not in self._formats:
            return ()
        return [other for suffix, other in self._formats[name].companions.items() if suffix != MARKER]

    def load(
        self,
        parameter: str,
        slices: tuple[TensorSlice, ...],
        shape: torch.Size,
        reader: TensorReader,
        dtype: torch.dtype,
    ) -> QuantizedWeight | Tensor:
        """Reads one parameter; slices of different formats are dequantized, as no weight can hold both.

        Args:
            dtype: what the network computes in.

        Raises:
            CheckpointError: the values of a quantized tensor or of its scales are not finite, or reading fails.
        """
        formats = [self._formats.get(each.name) for each in slices]
        kinds = {stored.kind if stored else None for stored in formats}
        # Weights with different smoothing cannot be stacked.
        is_smoothed = any(stored and SMOOTHING in stored.companions for stored in formats)
        if len(kinds) == 1 and None not in kinds and not (is_smoothed and len(formats) > 1):
            parts = [self._read_slice(each, reader, dtype) for each in slices]
            return parts[0] if len(parts) == 1 else type(parts[0]).stacked(parts)
        dense = self._read_dense(slices, shape, reader, dtype)
        return self._quantize(dense) if self._quantize and self._quantizable(parameter) else dense

    def _read_dense(
        self, slices: tuple[TensorSlice, ...], shape: torch.Size, reader: TensorReader, dtype: torch.dtype
    ) -> Tensor:
        """Reads slices, one below the other, into one new tensor."""
        dense = torch.empty(shape, dtype=dtype, device=reader.device)
        if not shape:
            reader.copy(slices[0], dense)
            return dense
        row = 0
        for each in slices:
            count = len(each.row_range(self.shape(each.name, reader.checkpoint)[0]))
            target = dense[row : row + count]
            if each.name in self._formats:
                target.copy_(self._read_slice(each, reader, dtype).dense(dtype))
            else:
                reader.copy(each, target)
            row += count
        return dense

    def _read_slice(
        self, tensor_slice: TensorSlice, reader: TensorReader, dtype: torch.dtype
    ) -> QuantizedWeight:
        stored = self._formats[tensor_slice.name]
        weight = _read_whole(tensor_slice.name, stored, reader)
        weight.dtype, weight.full_precision = dtype, stored.full_precision
        rows = tensor_slice.row_range(stored.shape[0])
        return weight if len(rows) == stored.shape[0] else weight.cut(rows.start, rows.stop)


def _read_whole(name: str, stored: QuantFormat, reader: TensorReader) -> QuantizedWeight:
    """Reads one stored tensor and its scales."""
    values = reader.read(name)
    scales = {suffix: reader.read(other) for suffix, other in stored.companions.items() if suffix != MARKER}
    infinite = [
        stored.companions[suffix] for suffix, scale in scales.items() if not scale.float().isfinite().all()
    ]
    element = torch.float8_e5m2 if stored.kind == FLOAT8_E5M2 else torch.float8_e4m3fn
    if stored.kind in (FLOAT8, FLOAT8_E5M2) and not is_finite(values, element):
        infinite.append(name)
    raise_if_problems(reader.checkpoint.path, [("not finite:", infinite)])

    scale, input_scale = scales[SCALE], scales.get(INPUT_SCALE)
    if stored.kind in (FLOAT8, FLOAT8_E5M2):
        return Float8Weight(values, scale, input_scale, element=element)
    if stored.kind == INT8:
        return Int8Weight(values, scale)
    if stored.kind == NVFP4_LINEAR:
        return Float4Weight.from_linear(values, scale, scales[SECOND_SCALE], input_scale)
    if stored.kind == NVFP4_TILED:
        weight = Float4Weight(values, scale, scales[SECOND_SCALE], input_scale)
        if SMOOTHING in scales:
            weight.smoothing = scales[SMOOTHING].float()
        return weight
    raise AssertionError(stored.kind)
