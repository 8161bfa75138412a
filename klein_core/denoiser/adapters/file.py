"""The bytes of one adapter's file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from klein_core.denoiser.adapters.problems import Problems
from klein_core.errors import CheckpointError
from klein_core.file_state import FileState as FileState
from klein_core.safetensors_header import Header, open_regular, read_header

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Element types that an adapter's factors may have."""
_NUMBER_DTYPES = {**_DTYPES, "F64": torch.float64, "I32": torch.int32, "I64": torch.int64}
"""Those that a single number may have: tools also store a whole alpha as such."""


@dataclass(frozen=True)
class AdapterFile:
    """A safetensors file in memory: whoever replaces the one on disk changes nothing here."""

    header: Header
    digest: str
    """SHA-256 of the whole file, in hexadecimal."""
    _data: bytes

    @classmethod
    def read(cls, path: Path) -> AdapterFile:
        """Reads all of a file.

        Raises:
            CheckpointError: it is not a sound safetensors file, or somebody wrote to it meanwhile.
        """
        before = FileState.of(path)
        header = adapter_header(path)
        with open_regular(path) as file:
            data = file.readall()
        if FileState.of(path) != before or len(data) != before.size_bytes:
            raise CheckpointError(f"{path.name} changed while it was read; try again")
        return cls(header, hashlib.sha256(data).hexdigest(), data)

    def tensor(self, name: str) -> Tensor:
        """Returns a tensor of its own in float32 on the CPU."""
        stored = self.header.tensors[name]
        data = bytearray(self._data[stored.start : stored.start + stored.byte_count])
        return torch.frombuffer(data, dtype=_NUMBER_DTYPES[stored.dtype]).view(stored.shape).float()


def adapter_header(path: Path) -> Header:
    """Reads a file's header.

    Raises:
        CheckpointError: it is not a sound safetensors file. The text is for callers from outside and has no folder.
    """
    try:
        return read_header(path)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(path), path.name)) from None


def check_dtypes(header: Header, problems: Problems) -> None:
    """Notes tensors of types that are not read."""
    for name, stored in header.tensors.items():
        allowed = _NUMBER_DTYPES if stored.element_count == 1 and name.endswith(".alpha") else _DTYPES
        if stored.dtype not in allowed:
            problems.add(f"not one of {', '.join(allowed)}:", f"{name} ({stored.dtype})")
