"""The one matrix product that every layer of the transformer uses."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klein_core.quantization.stored_weight import StoredWeight


class Linear(nn.Linear):
    """A linear layer without bias: (…, inputs) → (…, outputs). Its weight may be a `StoredWeight`."""

    __call__: Callable[..., Tensor]

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, tokens: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns tokens · weightᵀ, in `out` if that is given."""
        weight: Tensor | StoredWeight = self.weight
        if isinstance(weight, StoredWeight):
            return project_stored(tokens, weight, 0, self.out_features, out)
        return project(tokens, weight, out)

    def rows(self, tokens: Tensor, start: int, stop: int) -> Tensor:
        """Returns output channels start … stop of `forward`, at the cost of those alone."""
        weight: Tensor | StoredWeight = self.weight
        if isinstance(weight, StoredWeight):
            return project_stored(tokens, weight, start, stop)
        return project(tokens, weight[start:stop])


def project_stored(
    tokens: Tensor, weight: StoredWeight, start: int, stop: int, out: Tensor | None = None
) -> Tensor:
    """Returns tokens · rows start … stop transposed of a quantised weight; `out` is contiguous."""
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
    if _is_emulated(rows):
        product = F.linear(rows.float(), weight.float())
        product = product.to(tokens.dtype) if out is None else out.view(product.shape).copy_(product)
    elif out is None:
        product = F.linear(rows, weight)
    else:
        product = torch.mm(rows, weight.t(), out=out.view(len(rows), -1))
    return product.view(*tokens.shape[:-1], -1)


def _is_emulated(rows: Tensor) -> bool:
    """Whether bfloat16 products are emulated: float32 ones, conversion included, are then 3× as fast."""
    return (
        rows.dtype == torch.bfloat16
        and rows.device.type == "cpu"
        and not HAS_BFLOAT16_PRODUCTS
        and rows.shape[0] > 1
    )


HAS_BFLOAT16_PRODUCTS = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
