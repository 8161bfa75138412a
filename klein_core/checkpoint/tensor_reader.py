"""Reader of stored tensors: a bounded chunk at a time, directly into the target's memory where that is possible.

Files are read, not mapped: mapped pages would count as memory in addition to the weights, and a file that is truncated
while it is mapped kills the process. A parameter that keeps its dtype on the CPU is read without a copy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from io import FileIO
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from klein_core.checkpoint.files import Checkpoint
from klein_core.checkpoint.header import DTYPES, FileState, open_regular
from klein_core.checkpoint.key_mapping import TensorSlice
from klein_core.errors import CheckpointError

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, dtype.torch_name) for name, dtype in DTYPES.items() if dtype.torch_name
}
"""The format's name of an element type → torch's."""
_STAGING_BYTES = 32 * 1024**2


class TensorReader:
    """The needed files of a checkpoint, open during the `with` block.

    Args:
        checkpoint: the tensors and their files.
        names: the tensors to read; only their files are opened.
        device: where tensors are read to.

    Raises:
        CheckpointError: a file cannot be opened, or was replaced since its header was read.
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

    def __enter__(self) -> TensorReader:
        with ExitStack() as stack:
            for path in self._paths:
                file = self._files[path] = stack.enter_context(open_regular(path))
                # Offsets come from the header, so the file must still be the one whose header was read.
                if FileState.of_open(file.fileno()) != self.checkpoint.header(path).state:
                    raise CheckpointError(f"{path} changed since its header was read; try again")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._files.clear()
        self._staging = None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns a stored tensor, or its rows start … stop (exclusive), in the stored dtype.

        Raises:
            CheckpointError: the dtype is not supported, or the file was truncated since it was opened.
        """
        entry = self.checkpoint.entry(name)
        if entry.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{self.checkpoint.path}: {name} is {entry.dtype}, which is not supported")
        rows = TensorSlice(name, start, stop).row_range(entry.shape[0]) if entry.shape else range(0)
        shape = (len(rows), *entry.shape[1:]) if entry.shape else ()
        target = torch.empty(shape, dtype=TORCH_DTYPES[entry.dtype], device=self.device)
        self.copy(TensorSlice(name, start, stop), target)
        return target

    def copy(self, rows: TensorSlice, target: Tensor) -> None:
        """Copies rows of a stored tensor into a contiguous tensor of the same element count, converted to its dtype.

        Raises:
            CheckpointError: the file was truncated since it was opened.
            ValueError: the element counts differ.
        """
        entry = self.checkpoint.entry(rows.name)
        first, count = 0, 1
        if entry.shape:
            selected, width = rows.row_range(entry.shape[0]), prod(entry.shape[1:])
            first, count = selected.start * width, len(selected) * width
        values = target.view(-1)
        if count != len(values):
            raise ValueError(f"{rows} have {count} values, their target {len(values)}")
        if target.device.type == "cpu" and target.dtype == TORCH_DTYPES[entry.dtype]:
            self._fill(rows.name, first, values)
            return
        item_bytes = entry.byte_count // max(entry.element_count, 1)
        if self._staging is None:
            is_pinned = self.device.type == "cuda"
            self._staging = torch.empty(_STAGING_BYTES, dtype=torch.uint8, pin_memory=is_pinned)
        chunk = self._staging.view(TORCH_DTYPES[entry.dtype])[: _STAGING_BYTES // max(item_bytes, 1)]
        for begin in range(0, count, len(chunk)):
            part = chunk[: count - begin]
            self._fill(rows.name, first + begin, part)
            values[begin : begin + len(part)].copy_(part)

    def _fill(self, name: str, first: int, values: Tensor) -> None:
        """Fills `values` with the tensor's elements from index `first` on."""
        if not len(values):
            return
        path = self.checkpoint.files[name]
        file, left = self._files[path], values.view(torch.uint8).numpy().data
        file.seek(self.checkpoint.entry(name).start + first * values.element_size())
        while left:
            read = file.readinto(left)
            if not read:
                raise CheckpointError(
                    f"{path}: {name} cannot be read: the file was truncated since it was opened"
                )
            left = left[read:]
