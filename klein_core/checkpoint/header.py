"""Header of a safetensors file, read and checked against hostile contents. Torch-free.

A file is 8 bytes with the header's length, the header (JSON: tensor name → dtype, shape, byte range) and the
tensors' bytes without gaps. Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from klein_core.errors import CheckpointError, listed, raise_if_problems

MAXIMUM_HEADER_BYTES = 100_000_000
"""The format's own limit."""
MAXIMUM_VALUES = 4_000_000
"""Largest number of JSON values in a header. Published models have thousands of tensors, with eight values each."""
MAXIMUM_NAME_LENGTH = 1000
_MAXIMUM_AXES = 16
_LENGTH_BYTES = 8
_METADATA = "__metadata__"


class Dtype(NamedTuple):
    """An element type of the format."""

    bits: int
    torch_name: str = ""
    """Its name in torch; empty for those that no checkpoint of this model has."""


DTYPES: Mapping[str, Dtype] = MappingProxyType(
    {
        "F64": Dtype(64, "float64"),
        "F32": Dtype(32, "float32"),
        "F16": Dtype(16, "float16"),
        "BF16": Dtype(16, "bfloat16"),
        "F8_E4M3": Dtype(8, "float8_e4m3fn"),
        "F8_E5M2": Dtype(8, "float8_e5m2"),
        "F8_E8M0": Dtype(8),
        "F8_E4M3FNUZ": Dtype(8),
        "F8_E5M2FNUZ": Dtype(8),
        "F6_E2M3": Dtype(6),
        "F6_E3M2": Dtype(6),
        "F4": Dtype(4),
        "I64": Dtype(64, "int64"),
        "I32": Dtype(32, "int32"),
        "I16": Dtype(16),
        "I8": Dtype(8, "int8"),
        "U64": Dtype(64),
        "U32": Dtype(32),
        "U16": Dtype(16),
        "U8": Dtype(8, "uint8"),
        "BOOL": Dtype(8, "bool"),
        "C64": Dtype(64),
    }
)
"""Every element type of the format, by its name there."""
PLAIN_DTYPES = ("F32", "F16", "BF16")
"""Element types of weights that are not quantized."""
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip, as torch.save makes it with a pickle inside, which is never read",
    b"GGUF": "a GGUF file",
    **{bytes((0x80, protocol)): "a pickle, which is never read" for protocol in range(2, 6)},
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file."""

    dtype: str
    """A key of `DTYPES`."""
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    byte_count: int

    @property
    def element_count(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class FileState:
    """Inode, size and modification time: they change when a file is replaced or written to."""

    inode: int
    size_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Returns the state of a file. Raises CheckpointError when it is missing."""
        try:
            return cls._from_stat(path.stat())
        except OSError as error:
            raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from None

    @classmethod
    def of_open(cls, descriptor: int) -> FileState:
        """Returns the state of an open file, also when its path was replaced."""
        return cls._from_stat(os.fstat(descriptor))

    @classmethod
    def _from_stat(cls, status: os.stat_result) -> FileState:
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Header:
    """Tensors and metadata of one file."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    """Free text by the file's writer."""
    state: FileState
    """State of the file when the header was read."""


def read_header(path: Path) -> Header:
    """Reads and checks one file's header; the tensors are not read.

    Raises:
        CheckpointError: the file is missing, truncated, of another format, or its header breaks the format in any
            way: too long, not JSON, a name twice, an unknown dtype, bytes that do not fit a shape, or byte ranges
            that overlap, leave gaps or leave the file.
    """
    with open_regular(path) as file:
        state = FileState.of_open(file.fileno())
        text = _header_text(path, file, state.size_bytes)
    entries = _parsed(path, text)
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: its {_METADATA} is not a table of texts")
    data_start = _LENGTH_BYTES + len(text)
    tensors: dict[str, StoredTensor] = {}
    problems: dict[str, list[str]] = {}
    for name, entry in entries.items():
        checked = _checked_tensor(name, entry, data_start)
        if isinstance(checked, StoredTensor):
            tensors[name] = checked
        else:
            problems.setdefault(checked, []).append(name)
    raise_if_problems(path, problems.items())
    _check_ranges(path, tensors, data_start, state.size_bytes)
    return Header(path, tensors, metadata, state)


def open_regular(path: Path) -> FileIO:
    """Opens a regular file, unbuffered; a pipe or a device could block or never end.

    Raises:
        CheckpointError: the file is missing, not regular, or cannot be opened.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from None


def _header_text(path: Path, file: FileIO, byte_count: int) -> bytes:
    start = file.read(_LENGTH_BYTES)
    for magic, name in _OTHER_FORMATS.items():
        if start.startswith(magic):
            raise CheckpointError(f"{path} is not a safetensors file but {name}")
    length = int.from_bytes(start, "little")
    if len(start) < _LENGTH_BYTES:
        raise CheckpointError(f"{path} is truncated: it has {byte_count} bytes")
    if length > MAXIMUM_HEADER_BYTES:
        raise CheckpointError(
            f"{path} is not a safetensors file: its header would have {length} bytes; "
            f"the format allows {MAXIMUM_HEADER_BYTES}"
        )
    if length > byte_count - _LENGTH_BYTES:
        raise CheckpointError(
            f"{path} is truncated: its header has {length} bytes, the file {byte_count} in all"
        )
    text = bytearray()
    while len(text) < length and (part := file.read(length - len(text))):
        text += part
    return bytes(text)


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not a JSON object")
    # Counted before parsing: a value costs far more memory than its text does.
    if sum(map(text.count, (b"{", b"[", b","))) > MAXIMUM_VALUES:
        raise CheckpointError(f"{path}: its header has more than {MAXIMUM_VALUES} values")
    try:
        entries: dict[str, Any] = json.loads(
            text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_reject_constant
        )
    except RecursionError:
        raise CheckpointError(f"{path}: its header is nested too deeply") from None
    # Raised for malformed JSON, for text that is not UTF-8, for duplicate names and for numbers that are too long.
    except ValueError as error:
        raise CheckpointError(f"{path}: its header is not valid: {error}") from None
    return entries


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"it has twice {listed(name for name, count in counts.items() if count > 1)}")
    return names


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _checked_tensor(name: str, entry: object, data_start: int) -> StoredTensor | str:
    """Returns the tensor, or what is wrong with it."""
    if not 0 < len(name) <= MAXIMUM_NAME_LENGTH or not name.isprintable():
        return "invalid names:"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return "entries that are not dtype, shape and data_offsets:"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return "of a dtype that the format does not have:"
    if not _are_sizes(shape) or len(shape) > _MAXIMUM_AXES:
        return "of an invalid shape:"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return "with data_offsets that are not a byte range:"
    bits = prod(shape) * DTYPES[dtype].bits
    if bits != 8 * (offsets[1] - offsets[0]):
        return "with another number of bytes than dtype and shape require:"
    return StoredTensor(dtype, tuple(shape), data_start + offsets[0], offsets[1] - offsets[0])


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_ranges(path: Path, tensors: Mapping[str, StoredTensor], data_start: int, byte_count: int) -> None:
    """Rejects tensors that overlap, leave gaps, or do not end where the file ends."""
    end = data_start
    overlapping, gapped = [], []
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].byte_count)):
        if tensor.start < end:
            overlapping.append(name)
        elif tensor.start > end:
            gapped.append(name)
        end = max(end, tensor.start + tensor.byte_count)
    raise_if_problems(path, [("overlapping:", overlapping), ("after a gap:", gapped)])
    outside = [name for name, tensor in tensors.items() if tensor.start + tensor.byte_count > byte_count]
    if outside:
        raise CheckpointError(
            f"{path} is truncated: {listed(outside)} should end at byte {end} of {byte_count}"
        )
    if end < byte_count:
        raise CheckpointError(f"{path} has {byte_count - end} bytes at its end that belong to no tensor")
