"""The most memory that a piece of work takes in this process, beside what the process takes anyway."""

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
_FORGET_HIGHEST = "5"
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Peak(Generic[_Made]):
    """What was measured of something built and used."""

    made: _Made
    built_bytes: int
    """What it takes by itself: the weights."""
    peak_bytes: int
    """The most that the process took while it was used, its own included."""
    tensor_bytes: int
    """The most that tensors took at once while it was used, without what was there before."""


def measured_peak(device: str, build: Callable[[], _Made], use: Callable[[_Made], object]) -> Peak[_Made]:
    """Builds something and uses it once. What building alone takes for a moment does not count."""
    gc.collect()
    before = held_bytes(device)
    made = build()
    gc.collect()
    built = held_bytes(device)
    forget_highest(device)
    tensor_bytes = traced_peak(lambda: use(made)) if device == "cpu" else None
    if tensor_bytes is None:
        use(made)
        tensor_bytes = highest_bytes(device) - built
    return Peak(made, built - before, highest_bytes(device) - before, tensor_bytes)


def traced_peak(work: Callable[[], object]) -> int:
    """Returns the most bytes that torch's CPU allocator had given out at once during `work`.

    What matrix libraries keep for themselves is not in it: tens of MiB a process, whatever the model.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return int(max(held, default=0))


def held_bytes(device: str) -> int:
    """Returns what the process holds now: allocated on CUDA, resident elsewhere."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def highest_bytes(device: str) -> int:
    """Returns the most that it held since `forget_highest`."""
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else _status("VmHWM")


def forget_highest(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        _CLEAR.write_text(_FORGET_HIGHEST, encoding="ascii")


def _status(field: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
