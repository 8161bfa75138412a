"""Constants of quantized weights: formats, names of stored tensors, sizes of blocks and chunks. Torch-free."""

from __future__ import annotations

NO_QUANTIZATION = "none"
FLOAT8 = "fp8"
"""e4m3 floats."""
FLOAT8_E5M2 = "fp8 e5m2"
INT8 = "int8"
NVFP4_TILED = "nvfp4"
"""e2m1 floats, high nibble first, block scales in the tile order of the tensor cores."""
NVFP4_LINEAR = "nvfp4 (ModelOpt)"
"""e2m1 floats, low nibble first, block scales row by row."""
QUANTIZATIONS = (NO_QUANTIZATION, FLOAT8, INT8)
"""What plain weights can become while they are loaded."""

WEIGHT = ".weight"
SCALE = ".weight_scale"
SECOND_SCALE = ".weight_scale_2"
INPUT_SCALE = ".input_scale"
SMOOTHING = ".pre_quant_scale"
MARKER = ".comfy_quant"
COMPANION_SUFFIXES = (SCALE, SECOND_SCALE, INPUT_SCALE, SMOOTHING, MARKER)
"""What quantized files store next to `X.weight`: `X` plus one of these. They describe it and are no parameters."""

FLOAT8_CHUNK_VALUES = 1 << 24
"""Values that are quantized to fp8 at a time, so that fp32 intermediates stay small."""
FLOAT4_CHUNK_VALUES = 1 << 22
"""Values that are quantized to nvfp4 at a time: fewer, because block scales and codes take several fp32 copies."""

BLOCK = 16
"""Elements that share a block scale."""
TILE_ROWS = 128
TILE_COLUMNS = 4


def companions_of(name: str) -> dict[str, str]:
    """Returns suffix → the name of that companion of a quantized tensor `X.weight`."""
    base = name.removesuffix(WEIGHT)
    return {suffix: base + suffix for suffix in COMPANION_SUFFIXES}


def is_companion(name: str) -> bool:
    """Whether a stored tensor only describes another one."""
    return name.endswith(COMPANION_SUFFIXES)


def swizzled_shape(rows: int, columns: int) -> tuple[int, int]:
    """Returns the shape of block scales in tile order: both sides rounded up to whole tiles."""
    return -(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // TILE_COLUMNS) * TILE_COLUMNS
