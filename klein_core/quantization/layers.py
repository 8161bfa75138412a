"""Puts quantised weights into a network: into layers that know them, and in the place of an embedding table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from klein_core.quantization.stored_weight import StoredWeight


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
    """Makes `weight` the parameter `name` of `module`, whose layer knows it; an embedding table is replaced."""
    path, _, parameter = name.rpartition(".")
    layer = module.get_submodule(path)
    if type(layer) is nn.Embedding:
        module.set_submodule(path, StoredEmbedding(weight))
    else:
        delattr(layer, parameter)
        setattr(layer, parameter, weight)
