"""The one matrix product that every layer of the transformer uses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear layer without bias: (…, inputs) → (…, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return project(tokens, self.weight)


def project(tokens: Tensor, weight: Tensor) -> Tensor:
    """Returns tokens · weightᵀ in the tokens' dtype."""
    return F.linear(tokens, weight)
