"""What an adapter adds to a linear layer's product. It is never merged into the layer's weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, eq=False)
class Segment:
    """What an adapter adds to a range of one layer's output channels."""

    start: int
    """First output channel of the layer that it adds to."""
    stop: int
    term: Term
    factor: float
    """alpha / rank, or 1: what the term is multiplied with besides the request's scale."""
    first_row: int = 0
    """The term's own output channel that goes to `start`."""

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
            added = self.term.product(rows, start + shift, stop + shift)
            product[:, start - offset : stop - offset].add_(added, alpha=scale * self.factor)


@dataclass(frozen=True, kw_only=True)
class AdapterSummary:
    """What an adapter's file is, as far as its header tells."""

    kind: str
    """LoRA, LoKr, LoHa, or several of them joined by a plus sign."""
    rank: int
    """The largest; 0 where no factor is of low rank."""
    layer_count: int
    """Layers that it names."""
    size_bytes: int
    """Bytes of its tensors in the file."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Adapter:
    """An adapter's tensors on a device. Adapters are equal only to themselves."""

    name: str
    digest: str
    """SHA-256 of the file, in hexadecimal: what decides the results together with the scale."""
    summary: AdapterSummary
    segments: Mapping[str, tuple[Segment, ...]]
    """Name of a `Linear` of the transformer → what is added to its product."""

    def to(self, device: torch.device | str) -> Adapter:
        """Returns the same adapter on another device."""
        moved: dict[int, Term] = {}
        for segments in self.segments.values():
            for term in (segment.term for segment in segments):
                if id(term) not in moved:
                    moved[id(term)] = type(term)(*(tensor.to(device) for tensor in term))
        placed = {
            layer: tuple(replace(segment, term=moved[id(segment.term)]) for segment in segments)
            for layer, segments in self.segments.items()
        }
        return replace(self, segments=placed)

    @property
    def size_bytes(self) -> int:
        """Bytes on the device."""
        tensors = {id(tensor): tensor.nbytes for tensor in self._tensors()}
        return sum(tensors.values())

    def _tensors(self) -> Iterator[Tensor]:
        for segments in self.segments.values():
            for segment in segments:
                yield from segment.term


class ScaledAdapter(NamedTuple):
    """An adapter as one request wants it."""

    adapter: Adapter
    scale: float = 1.0

    @property
    def identity(self) -> str:
        """What decides its effect, for keys of whatever is computed with it."""
        return f"{self.adapter.digest} {self.scale!r}"
