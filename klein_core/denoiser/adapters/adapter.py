"""Adapters: low-rank and Kronecker additions to linear layers' products, never merged into the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from klein_core.linear import project


@dataclass(frozen=True, eq=False, kw_only=True)
class Adapter:
    """An adapter's tensors on a device. Compared by identity."""

    name: str
    digest: str
    """SHA-256 of the file, in hexadecimal. Together with the scale it determines the results."""
    summary: AdapterSummary
    slices: Mapping[str, tuple[DeltaSlice, ...]]
    """Name of a `Linear` of the transformer → what is added to its product."""

    def to(self, device: torch.device | str) -> Adapter:
        """Returns a copy on another device."""
        moved: dict[int, LoraDelta] = {}
        for slices in self.slices.values():
            for delta in (one.delta for one in slices):
                if id(delta) not in moved:
                    moved[id(delta)] = type(delta)(*(tensor.to(device) for tensor in delta))
        slices_there = {
            layer: tuple(replace(one, delta=moved[id(one.delta)]) for one in slices)
            for layer, slices in self.slices.items()
        }
        return replace(self, slices=slices_there)

    @property
    def size_bytes(self) -> int:
        """Bytes on the device; tensors that several slices share count once."""
        shared = {
            id(tensor): tensor.nbytes
            for slices in self.slices.values()
            for one in slices
            for tensor in one.delta
        }
        return sum(shared.values())


class ScaledAdapter(NamedTuple):
    """An adapter with the scale that a request gives it."""

    adapter: Adapter
    scale: float = 1.0

    @property
    def identity(self) -> str:
        """Key of the adapter's effect, for caches of results computed with it."""
        return f"{self.adapter.digest} {self.scale!r}"


@dataclass(frozen=True, kw_only=True)
class AdapterSummary:
    """Description of an adapter file, from its header."""

    kind: str
    """LoRA, LoKr, LoHa, or several of them joined by a plus sign."""
    rank: int
    """The largest; 0 where no factor is of low rank."""
    layer_count: int
    """Layers that the file names."""
    size_bytes: int
    """Bytes of the tensors in the file."""
    notes: tuple[str, ...] = ()
    """Sentences about header entries that are ignored, although another reader might obey them."""


@dataclass(frozen=True, eq=False)
class DeltaSlice:
    """A delta's rows that are added to a range of one layer's output channels."""

    start: int
    """First output channel of the layer that it adds to."""
    stop: int
    delta: LoraDelta
    factor: float
    """alpha / rank, or 1; multiplied with the request's scale."""
    first_row: int = 0
    """The delta's output channel that is added to channel `start`."""

    def add_to(self, product: Tensor, rows: Tensor, offset: int, scale: float) -> None:
        """Adds to a layer's product in place.

        Args:
            product: (rows, channels), the layer's output channels from `offset` on.
            rows: (rows, inputs).
            offset: the layer's output channel that `product` begins with.
            scale: the request's.
        """
        start, stop = max(self.start, offset), min(self.stop, offset + product.shape[1])
        if start < stop:
            shift = self.first_row - self.start
            added = self.delta.product(rows, start + shift, stop + shift)
            product[:, start - offset : stop - offset].add_(added, alpha=scale * self.factor)


class LowRank(NamedTuple):
    """Low-rank delta: up · down."""

    down: Tensor
    """(rank, inputs)."""
    up: Tensor
    """(outputs, rank)."""

    def product(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """Returns output channels start … stop of (rows, inputs): (rows, stop − start), in the rows' dtype."""
        return project(project(rows, self.down), self.up[start:stop])


class Kronecker(NamedTuple):
    """Kronecker delta: left ⊗ right.

    Output channel i · c + k depends on input channel j · d + l by left[i, j] · right[k, l].
    """

    left: Tensor
    """(a, b) where outputs = a · c and inputs = b · d."""
    right: Tensor
    """(c, d)."""

    def product(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """Computes `LowRank.product` for this delta, without materializing the whole matrix."""
        height, width = self.right.shape
        first, last = start // height, -(-stop // height)
        inner = project(torch.unflatten(rows, 1, (-1, width)), self.right)
        outer = project(inner.transpose(1, 2), self.left[first:last])
        channels = outer.transpose(1, 2).flatten(1)
        return channels[:, start - first * height : stop - first * height]


class Dense(NamedTuple):
    """Delta stored as a whole matrix."""

    weight: Tensor
    """(outputs, inputs)."""

    def product(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """Computes `LowRank.product` for this delta."""
        return project(rows, self.weight[start:stop])


LoraDelta = LowRank | Kronecker | Dense
"""What an adapter adds to one weight matrix."""


def hadamard(first: LowRank, second: LowRank) -> LowRank | Dense:
    """Returns the elementwise product of two low-rank matrices, in whichever exact form is smaller.

    A product of sums is a sum of products, so the result is of low rank too: rank₁ · rank₂.
    """
    rank = len(first.down) * len(second.down)
    inputs, outputs = first.down.shape[1], len(first.up)
    if rank * (inputs + outputs) >= inputs * outputs:
        return Dense((first.up @ first.down) * (second.up @ second.down))
    down = torch.einsum("ri,si->rsi", first.down, second.down).flatten(0, 1)
    up = torch.einsum("or,os->ors", first.up, second.up).flatten(1)
    return LowRank(down, up)
