"""Which quantised products a device computes itself."""

from __future__ import annotations

import torch

Capability = tuple[int, int]
"""A CUDA device's compute capability, major and minor."""

_FLOAT8_SINCE: Capability = (8, 9)
_FLOAT4_SINCE: Capability = (10, 0)


def multiplies_float8(capability: Capability | None) -> bool:
    """Whether the tensor cores take 8-bit floats (Ada, Hopper and later); `None` is no CUDA device."""
    return capability is not None and capability >= _FLOAT8_SINCE


def multiplies_float4(capability: Capability | None) -> bool:
    """Whether the tensor cores take 4-bit floats with block scales (Blackwell), and torch offers it."""
    return (
        capability is not None
        and capability >= _FLOAT4_SINCE
        and hasattr(torch, "_scaled_mm")
        and hasattr(torch, "float4_e2m1fn_x2")
    )


def capability_of(device: torch.device) -> Capability | None:
    """Returns the device's CUDA capability; `None` elsewhere, also on ROCm, whose 8-bit floats are others."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor
