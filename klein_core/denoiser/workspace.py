"""Reusable buffers for one step.

On a CPU, fresh pages cost about as much as the arithmetic between two matrix products, so inference overwrites
intermediate results that have no further reader. Autograd needs every intermediate result, and the compiler plans
memory itself: in both cases nothing is reused and every `out` is `None`, which torch takes as "allocate".
"""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Reusable buffers for one step; decides whether in-place operations are allowed."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @property
    def allows_inplace(self) -> bool:
        """Whether operations may overwrite their inputs: outside autograd and compilation."""
        return not (torch.is_grad_enabled() or torch.compiler.is_compiling())

    def inplace(self, tensor: Tensor) -> Tensor | None:
        """Returns `tensor` to be used as `out` of an operation on it, or `None` where that is not allowed."""
        return tensor if self.allows_inplace else None

    def buffer(self, name: str, like: Tensor, channels: int) -> Tensor | None:
        """Returns an uninitialized buffer shaped as `like` except for its last axis, or `None` as `inplace` does."""
        if not self.allows_inplace:
            return None
        shape = torch.Size((*like.shape[:-1], channels))
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < shape.numel():
            buffer = self._buffers[name] = like.new_empty(shape.numel())
        return buffer[: shape.numel()].view(shape)
