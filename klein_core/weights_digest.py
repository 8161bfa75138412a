"""Tells two sets of loaded weights apart without reading all of them."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

SAMPLES = 1024
"""Elements of each tensor that count, give or take; training of any kind changes more than the rest."""
_GOLDEN = 2654435769
"""2³² / φ: multiples of it, modulo 2³², are spread evenly whatever their number (Knuth, vol. 3, 6.4)."""


def weights_digest(module: nn.Module, *others: str) -> str:
    """Returns 32 hexadecimal digits that depend on every tensor's name, type, shape and samples of its values.

    Equal on every device and in every process that holds the same weights in the same precision, so that replicas
    agree. Samples are spread evenly over rows and columns: a model of gigabytes takes a fraction of a second.

    Args:
        module: a loaded model; what it keeps quantised counts as it is stored.
        others: what else decides the model's answers, for example its tokenizer.
    """
    digest = hashlib.blake2b(digest_size=16)
    for other in others:
        digest.update(f"{len(other)} {other}".encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_sampled(tensor))
    return digest.hexdigest()


def _sampled(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    picked = flat[_sampled_places(flat.numel()).to(flat.device)].cpu()
    return bytes(picked.view(torch.uint8).numpy())


def _sampled_places(count: int) -> Tensor:
    """Returns one place in each of about `SAMPLES` equal parts of a tensor, never the same place in two of them.

    A fixed stride would see few columns: in klein's shapes it is a multiple of the row's length.
    """
    stride = max(1, count // SAMPLES)
    parts = torch.arange(-(-count // stride))
    within = (parts * _GOLDEN % (1 << 32)) * stride >> 32
    return (parts * stride + within).clamp(max=count - 1)
