"""Linear layers with plain or quantized weights, and the fp32 fallback of CPUs that have no bfloat16 instructions.

There, torch emulates bfloat16 matmuls; multiplying fp32 copies is several times as fast.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klein_core.quantization.quantized_weight import QuantizedWeight

HAS_BFLOAT16_PRODUCTS = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def needs_fp32_fallback(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device emulates products of this dtype, so that multiplying fp32 copies is faster."""
    return dtype == torch.bfloat16 and device.type == "cpu" and not HAS_BFLOAT16_PRODUCTS


class Addition(Protocol):
    """A term that an adapter adds to a layer's output."""

    def add_to(self, product: Tensor, rows: Tensor, offset: int) -> None:
        """Adds in place to `product` (rows, channels), the layer's output channels from `offset` on."""


class Linear(nn.Linear):
    """A linear layer without bias: (…, inputs) → (…, outputs). Its weight may be a `QuantizedWeight`."""

    __call__: Callable[..., Tensor]

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.adaptations: dict[int, Sequence[Addition]] = {}
        """Thread id → the additions to its outputs, set for the duration of one step."""
        self.is_adapted = False
        """Whether any thread's step has adapters. Equal in all layers that a step runs, also in those that no adapter
        changes, so that compiled blocks have two programs and not one for each set of adapted layers."""

    def forward(self, tokens: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns tokens · weightᵀ, in `out` if that is given."""
        weight: Tensor | QuantizedWeight = self.weight
        if isinstance(weight, QuantizedWeight):
            product = project_stored(tokens, weight, 0, self.out_features, out)
        else:
            product = project(tokens, weight, out)
        return self._adapted(product, tokens, 0)

    def rows(self, tokens: Tensor, start: int, stop: int) -> Tensor:
        """Returns output channels start … stop of `forward`, at the cost of those alone."""
        weight: Tensor | QuantizedWeight = self.weight
        if isinstance(weight, QuantizedWeight):
            product = project_stored(tokens, weight, start, stop)
        else:
            product = project(tokens, weight[start:stop])
        return self._adapted(product, tokens, start)

    def adapt(self, thread: int, additions: Sequence[Addition]) -> None:
        """Sets the additions to one thread's outputs, possibly none. Not thread-safe."""
        self.adaptations[thread] = additions
        self.is_adapted = True

    def restore(self, thread: int) -> None:
        """Undoes `adapt`."""
        del self.adaptations[thread]
        self.is_adapted = bool(self.adaptations)

    def _adapted(self, product: Tensor, tokens: Tensor, offset: int) -> Tensor:
        if self.is_adapted:
            self._adapt(product, tokens, offset)
        return product

    def _adapt(self, product: Tensor, tokens: Tensor, offset: int) -> None:
        for addition in self.adaptations.get(threading.get_ident(), ()):
            addition.add_to(product.view(-1, product.shape[-1]), tokens.flatten(0, -2), offset)


def project_stored(
    tokens: Tensor, weight: QuantizedWeight, start: int, stop: int, out: Tensor | None = None
) -> Tensor:
    """Returns tokens · rows start … stop transposed of a quantized weight; `out` is contiguous."""
    if tokens.numel() == 0:
        return tokens.new_empty(*tokens.shape[:-1], stop - start)
    if not weight.multiplies(tokens, start, stop):
        return project(tokens, weight.dense(tokens.dtype, start, stop), out)
    rows = tokens.flatten(0, -2)
    product = weight.product(rows, start, stop, None if out is None else out.view(len(rows), -1))
    return product.view(*tokens.shape[:-1], -1)


def project(tokens: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns tokens · weightᵀ in the tokens' dtype; `out` is contiguous."""
    rows = tokens.flatten(0, -2)
    if len(rows) == 0:
        return tokens.new_empty(*tokens.shape[:-1], len(weight))
    # A single row is faster without copies.
    if len(rows) > 1 and needs_fp32_fallback(rows.device, rows.dtype):
        product = F.linear(rows.float(), weight.float())
        product = product.to(tokens.dtype) if out is None else out.view(product.shape).copy_(product)
    elif out is None:
        product = F.linear(rows, weight)
    else:
        product = torch.mm(rows, weight.t(), out=out.view(len(rows), -1))
    return product.view(*tokens.shape[:-1], -1)
