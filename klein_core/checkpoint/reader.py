"""Reads stored tensors a bounded piece at a time, straight to where they are to be.

Files are read, not mapped: mapped pages would count as memory beside the weights, and a file that is cut while it
is mapped ends the process. A parameter that keeps its dtype on the CPU is read into its own memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from klein_core.checkpoint.files import Checkpoint
from klein_core.checkpoint.header import DTYPES, FileState, StoredTensor, open_regular
from klein_core.checkpoint.key_mapping import TensorSlice
from klein_core.errors import CheckpointError

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, dtype.torch_name) for name, dtype in DTYPES.items() if dtype.torch_name
}
"""The format's name of an element type → torch's."""
_STAGING_BYTES = 32 * 1024**2


class Reader:
    """The needed files of a checkpoint, open for as long as the `with` block.

    Args:
        checkpoint: says where each tensor lies.
        names: the tensors that will be read; only their files are opened.
        device: where tensors are read to.

    Raises:
        CheckpointError: a file cannot be opened, or is not the one any more whose header was checked.
    """

    def __init__(
        self, checkpoint: Checkpoint, names: Collection[str], device: torch.device | str = "cpu"
    ) -> None:
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        self._paths = sorted({checkpoint.files[name] for name in names})
        self._files: dict[Path, FileIO] = {}
        self._stack = ExitStack()
        self._staging: Tensor | None = None

    def __enter__(self) -> Reader:
        with ExitStack() as stack:
            for path in self._paths:
                self._files[path] = stack.enter_context(self._opened(path))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._files.clear()
        self._staging = None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns a stored tensor, or its rows from `start` up to but not with `stop`, as it is stored.

        Raises:
            CheckpointError: torch has no such dtype, or the file was cut since it was opened.
        """
        entry = self.checkpoint.entry(name)
        if entry.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{self.checkpoint.path}: {name} is {entry.dtype}, which cannot be read")
        rows = TensorSlice(name, start, stop).row_range(entry.shape[0]) if entry.shape else range(0)
        shape = (len(rows), *entry.shape[1:]) if entry.shape else ()
        target = torch.empty(shape, dtype=TORCH_DTYPES[entry.dtype], device=self.device)
        self.copy(TensorSlice(name, start, stop), target)
        return target

    def copy(self, piece: TensorSlice, target: Tensor) -> None:
        """Copies a piece's values into a contiguous tensor with as many of them, converted to its dtype."""
        entry = self.checkpoint.entry(piece.name)
        first, count = _elements(entry, piece)
        values = target.view(-1)
        if count != len(values):
            raise ValueError(f"{piece} has {count} values, its target {len(values)}")
        if target.device.type == "cpu" and target.dtype == TORCH_DTYPES[entry.dtype]:
            self._fill(piece.name, first, values)
            return
        item_bytes = entry.byte_count // max(entry.element_count, 1)
        chunk = self._staging_buffer().view(TORCH_DTYPES[entry.dtype])[: _STAGING_BYTES // max(item_bytes, 1)]
        for begin in range(0, count, len(chunk)):
            part = chunk[: count - begin]
            self._fill(piece.name, first + begin, part)
            values[begin : begin + len(part)].copy_(part)

    def _opened(self, path: Path) -> FileIO:
        """Opens a file. Offsets come from its header: read from another file they would be noise."""
        file = open_regular(path)
        if FileState.of_open(file.fileno()) != self.checkpoint.header(path).state:
            file.close()
            raise CheckpointError(f"{path} changed since its header was read; try again")
        return file

    def _fill(self, name: str, first: int, values: Tensor) -> None:
        """Reads as many elements as `values` has, from the tensor's `first` on, into its memory."""
        if not len(values):
            return
        path = self.checkpoint.files[name]
        file, left = self._files[path], values.view(torch.uint8).numpy().data
        file.seek(self.checkpoint.entry(name).start + first * values.element_size())
        while left:
            read = file.readinto(left)
            if not read:
                raise CheckpointError(f"{path}: {name} cannot be read: the file was cut since it was opened")
            left = left[read:]

    def _staging_buffer(self) -> Tensor:
        if self._staging is None:
            is_pinned = self.device.type == "cuda"
            self._staging = torch.empty(_STAGING_BYTES, dtype=torch.uint8, pin_memory=is_pinned)
        return self._staging


def _elements(entry: StoredTensor, piece: TensorSlice) -> tuple[int, int]:
    """Returns where a piece begins among its tensor's elements, and how many it has."""
    if not entry.shape:
        return 0, 1
    rows = piece.row_range(entry.shape[0])
    row_elements = entry.element_count // max(entry.shape[0], 1)
    return rows.start * row_elements, len(rows) * row_elements
