"""Memory that the blocks of one step share.

Fresh pages cost a CPU about as much as the arithmetic between two matrix products, so inference overwrites
values that nobody reads again. While gradients are recorded every value has to stay, and the compiler plans
memory itself: then nothing is shared and every `out` is `None`, which torch takes as "allocate".
"""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Named buffers, and leave to overwrite."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @property
    def may_overwrite(self) -> bool:
        """Whether values may be computed in place."""
        return not (torch.is_grad_enabled() or torch.compiler.is_compiling())

    def over(self, tensor: Tensor) -> Tensor | None:
        """Returns `tensor` as a place for a result computed from it."""
        return tensor if self.may_overwrite else None

    def take(self, name: str, like: Tensor, channels: int) -> Tensor | None:
        """Returns a buffer shaped as `like` but for its last axis, holding whatever its last user left."""
        if not self.may_overwrite:
            return None
        shape = torch.Size((*like.shape[:-1], channels))
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < shape.numel():
            buffer = self._buffers[name] = like.new_empty(shape.numel())
        return buffer[: shape.numel()].view(shape)
