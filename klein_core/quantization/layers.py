"""Puts quantised weights into a network: into layers that know them, and in the place of those that do not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klein_core.quantization.stored_weight import StoredWeight


class StoredLinear(nn.Module):
    """Stands where a linear layer without bias stood: (…, inputs) → (…, outputs)."""

    def __init__(self, weight: StoredWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, tokens: Tensor) -> Tensor:
        outputs = len(self.weight.values)
        if not self.weight.multiplies(tokens, 0, outputs):
            return F.linear(tokens, self.weight.dense(tokens.dtype))
        product = self.weight.product(tokens.flatten(0, -2), 0, outputs)
        return product.view(*tokens.shape[:-1], -1)


class StoredEmbedding(nn.Module):
    """Stands where an embedding table stood: token numbers (…) → (…, channels)."""

    def __init__(self, weight: StoredWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, numbers: Tensor) -> Tensor:
        distinct, places = torch.unique(numbers, return_inverse=True)
        rows = [self.weight.decoded(number, number + 1) for number in distinct.tolist()]
        return torch.cat(rows).to(self.weight.dtype)[places]


def place(module: nn.Module, name: str, weight: StoredWeight) -> None:
    """Makes `weight` the parameter `name` of `module`; torch's own layers are replaced by ones that know it."""
    path, _, parameter = name.rpartition(".")
    layer = module.get_submodule(path)
    if type(layer) is nn.Linear:
        module.set_submodule(path, StoredLinear(weight))
    elif type(layer) is nn.Embedding:
        module.set_submodule(path, StoredEmbedding(weight))
    else:
        delattr(layer, parameter)
        setattr(layer, parameter, weight)
