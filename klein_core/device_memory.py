"""How much memory a device has left. Imports torch."""

from __future__ import annotations

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Returns what could still be allocated on `device`, memory that torch keeps for reuse included."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory()) - int(torch.mps.current_allocated_memory())
    return free_host_bytes()


def free_host_bytes(meminfo: Path = _MEMINFO, group: Path = _GROUP) -> int:
    """Returns what this machine can still give to programs, or this container if that is less.

    A system that does not tell is taken to have no limit.
    """
    left = [available for available in (_available(meminfo), _left_in_group(group)) if available is not None]
    return min(left, default=2**63 - 1)


def _available(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _left_in_group(group: Path) -> int | None:
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        pages = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    # Cached files count as used but are given up when memory is asked for.
    cached = next((int(line.split()[1]) for line in pages if line.startswith("inactive_file ")), 0)
    return None if limit == "max" else int(limit) - used + cached
