"""Bytes as a person reads them: files as sellers of disks count them, memory as makers of devices do."""

from __future__ import annotations

_FILE_UNITS = ("bytes", "kB", "MB", "GB", "TB")
_GIB = 1 << 30
_MIB = 1 << 20


def file_size(byte_count: float) -> str:
    """Returns what files or a disk take, in powers of 1000 and three digits: 7.75 GB."""
    unit = 0
    while byte_count >= 1000 and unit < len(_FILE_UNITS) - 1:
        byte_count, unit = byte_count / 1000, unit + 1
    number = f"{byte_count:.3g}" if unit and byte_count < 1000 else f"{byte_count:,.0f}"
    return f"{number} {_FILE_UNITS[unit]}"


def memory_size(byte_count: int) -> str:
    """Returns what a device's memory holds, in powers of 1024: 7.22 GiB."""
    return f"{byte_count / _GIB:.2f} GiB" if byte_count >= _GIB else f"{byte_count / _MIB:.0f} MiB"
