"""Processors without bfloat16 products of their own, on which fp32 copies are several times as fast as torch's way."""

from __future__ import annotations

import torch

HAS_BFLOAT16_PRODUCTS = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def is_emulated(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype are emulated, so that ours multiply fp32 copies and round the result."""
    return dtype == torch.bfloat16 and device.type == "cpu" and not HAS_BFLOAT16_PRODUCTS
