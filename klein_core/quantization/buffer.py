"""The one piece of memory into which all quantised weights of a model are unfolded, layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor


class DenseBuffer:
    """Lends room for one dequantised layer; the next loan overwrites the last one.

    One model runs on one thread, so at most one layer is unfolded at a time. While gradients are recorded or a
    program is traced every value has to stay, and each loan is memory of its own.
    """

    def __init__(self) -> None:
        self._rooms: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def lend(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a matrix of that shape, holding whatever was there before."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.empty(shape, dtype=dtype, device=device)
        size = shape[0] * shape[1]
        room = self._rooms.get((device, dtype))
        if room is None or room.numel() < size:
            # Dropped first, so that the old and the new one never exist together.
            room = None
            self._rooms.pop((device, dtype), None)
            room = self._rooms[device, dtype] = torch.empty(size, dtype=dtype, device=device)
        return room[:size].view(shape)
