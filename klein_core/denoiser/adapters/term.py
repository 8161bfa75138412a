"""What an adapter adds to a linear layer's product. It is never merged into the layer's weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from klein_core.linear import project


class LowRank(NamedTuple):
    """up · down."""

    down: Tensor
    """(rank, inputs)."""
    up: Tensor
    """(outputs, rank)."""

    def product(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """Returns output channels start … stop of (rows, inputs): (rows, stop − start), in the rows' dtype."""
        return project(project(rows, self.down), self.up[start:stop])


class Kronecker(NamedTuple):
    """left ⊗ right: output channel i · c + k from input channel j · d + l by left[i, j] · right[k, l]."""

    left: Tensor
    """(a, b) where outputs = a · c and inputs = b · d."""
    right: Tensor
    """(c, d)."""

    def product(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """As `LowRank.product`; the whole matrix is never made."""
        height, width = self.right.shape
        first, last = start // height, -(-stop // height)
        inner = project(torch.unflatten(rows, 1, (-1, width)), self.right)
        outer = project(inner.transpose(1, 2), self.left[first:last])
        channels = outer.transpose(1, 2).flatten(1)
        return channels[:, start - first * height : stop - first * height]


class Dense(NamedTuple):
    """A matrix that has no cheaper form."""

    weight: Tensor
    """(outputs, inputs)."""

    def product(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """As `LowRank.product`."""
        return project(rows, self.weight[start:stop])


Term = LowRank | Kronecker | Dense


def hadamard(first: LowRank, second: LowRank) -> LowRank | Dense:
    """Returns the elementwise product of two low-rank matrices, in whichever exact form is smaller.

    A product of sums is a sum of products, so it is of low rank too: rank₁ · rank₂.
    """
    rank = len(first.down) * len(second.down)
    inputs, outputs = first.down.shape[1], len(first.up)
    if rank * (inputs + outputs) >= inputs * outputs:
        return Dense((first.up @ first.down) * (second.up @ second.down))
    down = torch.einsum("ri,si->rsi", first.down, second.down).flatten(0, 1)
    up = torch.einsum("or,os->ors", first.up, second.up).flatten(1)
    return LowRank(down, up)
