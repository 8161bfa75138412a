"""Writes quantized matrices from the formats' descriptions alone; shares no code with the reader.

Every writer returns the tensors of one layer by the names that follow the layer's own, and the exact values that they
stand for, in fp32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3_MAX = 448.0
BLOCK = 16


class Quantized(NamedTuple):
    """One layer as a file holds it."""

    tensors: dict[str, Tensor]
    """By suffix: `weight`, `weight_scale`, …"""
    values: Tensor
    """(rows, columns) fp32: what these tensors stand for."""


def write_float8(weight: Tensor, *, input_scale: float | None = 0.02, per_row: bool = False) -> Quantized:
    """fp8 e4m3 with one scale, or one a row."""
    largest = weight.abs().amax(dim=1) if per_row else weight.abs().amax()
    scale = (largest / E4M3_MAX).float()
    column = scale[:, None] if per_row else scale
    floats = (weight.float() / column).to(torch.float8_e4m3fn)
    tensors = {"weight": floats, "weight_scale": scale}
    if input_scale is not None:
        tensors["input_scale"] = torch.tensor(input_scale)
    return Quantized(tensors, floats.float() * column)


def write_int8(weight: Tensor) -> Quantized:
    """Eight-bit whole numbers with one scale a row."""
    scale = weight.float().abs().amax(dim=1) / 127
    numbers = (weight.float() / scale[:, None]).round().to(torch.int8)
    return Quantized({"weight": numbers, "weight_scale": scale}, numbers.float() * scale[:, None])


def write_nvfp4(weight: Tensor, *, input_scale: float | None = 0.02) -> Quantized:
    """The official files' NVFP4: even element in the high nibble, block scales in tiles of 128 by 4."""
    codes, block_scales, scale, values = _nvfp4_codes(weight.float())
    packed = codes[:, 0::2] * 16 + codes[:, 1::2]
    return Quantized(_nvfp4_tensors(packed, tiled(block_scales), scale, input_scale), values)


def write_smoothed_nvfp4(weight: Tensor) -> Quantized:
    """The official NVFP4 with a factor for each input, by which the columns were divided first."""
    smoothing = torch.linspace(0.25, 4, weight.shape[1])
    quantized = write_nvfp4(weight.float() / smoothing)
    tensors = {**quantized.tensors, "pre_quant_scale": smoothing}
    return Quantized(tensors, quantized.values * smoothing)


def write_modelopt_nvfp4(weight: Tensor, *, input_scale: float | None = 0.02) -> Quantized:
    """ModelOpt's NVFP4: even element in the low nibble, block scales row by row."""
    codes, block_scales, scale, values = _nvfp4_codes(weight.float())
    packed = codes[:, 0::2] + codes[:, 1::2] * 16
    return Quantized(_nvfp4_tensors(packed, block_scales, scale, input_scale), values)


def tiled(scales: Tensor) -> Tensor:
    """Writes e4m3 scales (rows, columns) where the 128 × 4 layout has them, one by one."""
    rows, columns = scales.shape
    tile_rows, tile_columns = -(-rows // 128), -(-columns // 4)
    flat = torch.zeros(tile_rows * tile_columns * 512, dtype=torch.uint8)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    tile = row // 128 * tile_columns + column // 4
    offset = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
    flat[offset.flatten()] = scales.view(torch.uint8).flatten()
    return flat.view(torch.float8_e4m3fn).view(128 * tile_rows, 4 * tile_columns)


def _nvfp4_codes(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns codes (rows, columns) uint8, block scales (rows, columns / 16) e4m3, the scale, and the values."""
    rows, columns = weight.shape
    scale = weight.abs().max() / (E4M3_MAX * 6)
    blocks = weight.view(rows, columns // BLOCK, BLOCK)
    block_scales = (blocks.abs().amax(dim=-1) / 6 / scale).to(torch.float8_e4m3fn)
    factor = (block_scales.float() * scale).repeat_interleave(BLOCK, dim=1)
    grid = torch.tensor(E2M1_VALUES)
    # The nearest of the eight magnitudes; which of two equally near ones does not matter to a reader.
    exact = torch.where(factor > 0, weight / factor, 0)
    magnitudes = (exact.abs()[..., None] - grid).abs().argmin(dim=-1)
    negative = exact < 0
    codes = (magnitudes + 8 * negative).to(torch.uint8)
    values = torch.where(negative, -grid[magnitudes], grid[magnitudes]) * factor
    return codes, block_scales, scale, values


def _nvfp4_tensors(
    packed: Tensor, block_scales: Tensor, scale: Tensor, input_scale: float | None
) -> dict[str, Tensor]:
    tensors = {"weight": packed, "weight_scale": block_scales, "weight_scale_2": scale}
    return tensors if input_scale is None else {**tensors, "input_scale": torch.tensor(input_scale)}


WRITERS: dict[str, Callable[[Tensor], Quantized]] = {
    "float8_e4m3fn": write_float8,
    "nvfp4": write_nvfp4,
    "int8_tensorwise": write_int8,
}
"""ComfyUI's names."""


class QuantizedFile(NamedTuple):
    """A whole component."""

    tensors: dict[str, Tensor]
    layers: list[str]
    """Names of the quantized tensors, without `.weight`."""
    values: dict[str, Tensor]
    """The same component unquantized, with the values that the quantized tensors stand for."""


def quantized_file(
    tensors: Mapping[str, Tensor], write: Callable[[Tensor], Quantized], is_quantized: Callable[[str], bool]
) -> QuantizedFile:
    """Quantizes the chosen ones of a component's tensors; the others stay as they are."""
    file = QuantizedFile({}, [], {})
    for name, tensor in tensors.items():
        if not is_quantized(name):
            file.tensors[name] = file.values[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        quantized = write(tensor.float())
        file.tensors.update({f"{layer}.{suffix}": part for suffix, part in quantized.tensors.items()})
        file.layers.append(layer)
        file.values[name] = quantized.values
    return file


def comfy_header(layers: Iterable[str], form: str, **more: object) -> dict[str, str]:
    """The table that older files have in their header."""
    table = {"format_version": "1.0", "layers": {layer: {"format": form, **more} for layer in layers}}
    return {"_quantization_metadata": json.dumps(table)}


def comfy_markers(layers: Iterable[str], form: str, **more: object) -> dict[str, Tensor]:
    """The tensors that newer files have instead."""
    content = json.dumps({"format": form, **more}).encode()
    return {f"{layer}.comfy_quant": torch.tensor(list(content), dtype=torch.uint8) for layer in layers}


def is_block_matrix(name: str) -> bool:
    """What published files quantize of a transformer, in either naming."""
    return re.match(r"(double|single)_blocks|(single_)?transformer_blocks", name) is not None and (
        name.endswith(".weight") and ".norm" not in name
    )
