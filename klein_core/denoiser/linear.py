"""The one matrix product that every layer of the transformer uses."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear layer without bias: (…, inputs) → (…, outputs)."""

    __call__: Callable[..., Tensor]

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, tokens: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns tokens · weightᵀ, in `out` if that is given."""
        return project(tokens, self.weight, out)


def project(tokens: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns tokens · weightᵀ in the tokens' dtype; `out` is contiguous."""
    if _is_emulated(tokens):
        product = F.linear(tokens.float(), weight.float())
        return product.to(tokens.dtype) if out is None else out.copy_(product)
    if out is None:
        return F.linear(tokens, weight)
    torch.mm(tokens.flatten(0, -2), weight.t(), out=out.view(-1, out.shape[-1]))
    return out


def _is_emulated(tokens: Tensor) -> bool:
    """Whether bfloat16 products are emulated: float32 ones, conversion included, are then 3× as fast."""
    return (
        tokens.dtype == torch.bfloat16
        and tokens.device.type == "cpu"
        and not HAS_BFLOAT16_PRODUCTS
        and tokens.shape[:-1].numel() > 1
    )


HAS_BFLOAT16_PRODUCTS = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
