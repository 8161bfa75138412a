"""The one piece of memory into which all quantised weights of a model are unfolded, layer by layer."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _Rooms(threading.local):
    """What one thread unfolds into, by device and type."""

    def __init__(self) -> None:
        self.rooms: dict[tuple[torch.device, torch.dtype], Tensor] = {}


class DenseBuffer:
    """Lends room for one dequantised layer; the next loan overwrites the last one.

    A thread computes one layer at a time; each has rooms of its own. While gradients are recorded or a program is
    traced every value has to stay, and each loan is memory of its own.
    """

    def __init__(self) -> None:
        self._of_thread = _Rooms()

    def __deepcopy__(self, memo: dict[int, object]) -> DenseBuffer:
        """A copied model unfolds its layers elsewhere."""
        return DenseBuffer()

    def lend(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a matrix of that shape, holding whatever was there before."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.empty(shape, dtype=dtype, device=device)
        rooms = self._of_thread.rooms
        size = shape[0] * shape[1]
        if (device, dtype) not in rooms or rooms[device, dtype].numel() < size:
            # Dropped first, so that the old and the new one never exist together.
            rooms.pop((device, dtype), None)
            rooms[device, dtype] = torch.empty(size, dtype=dtype, device=device)
        return rooms[device, dtype][:size].view(shape)
