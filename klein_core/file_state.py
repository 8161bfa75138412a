"""Tells whether a file is still the one that was looked at. Torch-free."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from klein_core.errors import CheckpointError


@dataclass(frozen=True)
class FileState:
    """What changes when somebody replaces a file or writes into it."""

    inode: int
    size_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Asks the file system. Raises CheckpointError when the file is not there."""
        try:
            return cls._told(path.stat())
        except OSError as error:
            raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from None

    @classmethod
    def of_open(cls, descriptor: int) -> FileState:
        """Returns an open file's, whatever its name stands for by now."""
        return cls._told(os.fstat(descriptor))

    @classmethod
    def _told(cls, status: os.stat_result) -> FileState:
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)
