"""Keeps the C allocator from giving large blocks back to the system between two uses.

glibc takes blocks above 128 KiB from the system and returns them when they are freed, so every 1 MiB frame
costs 256 page faults each time it is copied. An 8 MiB tensor's hop takes nearly twice the time then, as
`benchmarks/transport.py` shows with `--stock-allocator`.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_BLOCK_BYTES = 32 << 20
"""Smaller blocks are kept. The largest value that glibc takes; few tensors on the wire are larger."""
_KEPT_BYTES = 64 << 20
"""Free memory at the heap's end beyond this goes back to the system."""


def keep_large_blocks() -> bool:
    """Sets it for this process; returns whether the C library is one where it can be set."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _BLOCK_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
