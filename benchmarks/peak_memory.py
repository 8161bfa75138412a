"""Peak memory of a piece of work in this process, without what the process held before."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_HIGHEST = "5"
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Peak(Generic[_Made]):
    """Memory of something that was built and used once."""

    made: _Made
    built_bytes: int
    """Bytes of the thing itself: the weights."""
    peak_bytes: int
    """Peak of the process during the use, the thing included."""
    tensor_bytes: int
    """Peak of tensors that were allocated during the use."""


def measured_peak(device: str, build: Callable[[], _Made], use: Callable[[_Made], object]) -> Peak[_Made]:
    """Builds something and uses it once. Temporary memory of the build is not counted."""
    gc.collect()
    before = held_bytes(device)
    made = build()
    gc.collect()
    built = held_bytes(device)
    reset_highest(device)
    tensor_bytes = traced_peak(lambda: use(made)) if device == "cpu" else None
    if tensor_bytes is None:
        use(made)
        tensor_bytes = highest_bytes(device) - built
    return Peak(made, built - before, highest_bytes(device) - before, tensor_bytes)


def traced_peak(work: Callable[[], object]) -> int:
    """Returns the peak bytes that torch's CPU allocator had allocated during `work`.

    Buffers of matrix libraries are not included: tens of MiB a process, whatever the model.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return int(max(held, default=0))


def held_bytes(device: str) -> int:
    """Returns the bytes that the process holds: allocated on CUDA, resident elsewhere."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def highest_bytes(device: str) -> int:
    """Returns the peak bytes that the process held since `reset_highest`."""
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else _status("VmHWM")


def reset_highest(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        _CLEAR.write_text(_RESET_HIGHEST, encoding="ascii")


def _status(field: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
