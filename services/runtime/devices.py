"""Devices and element types by the names that settings use. Imports torch."""

from __future__ import annotations

import torch

from services.runtime import metrics
from services.runtime.settings import SettingsError

_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "checkpoint": None}


def resolve_device(name: str) -> torch.device:
    """Returns the device of a `device` setting; `auto` is the first GPU, or the CPU without one.

    Raises:
        SettingsError: there is no such device here.
    """
    if name == "auto":
        return torch.device(_best_device())
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingsError(f"KLEIN_DEVICE is {name!r}; it must be auto, cpu, cuda, cuda:N or mps") from None
    available = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = available.get(device.type, 0)
    if (device.index or 0) >= count:
        raise SettingsError(f"KLEIN_DEVICE is {name!r}; this machine has {count} such devices")
    return device


def resolve_dtype(name: str) -> torch.dtype | None:
    """Returns the dtype of a `dtype` setting; `None` keeps the checkpoint's own."""
    return _DTYPES[name]


def set_threads(count: int) -> None:
    """Sets how many CPU threads one operation uses; 0 leaves torch's choice."""
    if count:
        torch.set_num_threads(count)


def report_memory(stage: str, device: torch.device) -> None:
    """Makes `klein_device_memory_bytes` tell what torch holds on a GPU; there is nothing to tell of a CPU."""
    if device.type != "cuda":
        return
    gauge = metrics.DEVICE_MEMORY_BYTES
    gauge.labels(stage, "allocated").set_function(lambda: torch.cuda.memory_allocated(device))
    gauge.labels(stage, "reserved").set_function(lambda: torch.cuda.memory_reserved(device))


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda:0"
    return "mps" if torch.backends.mps.is_available() else "cpu"
