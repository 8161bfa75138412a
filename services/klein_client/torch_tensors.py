"""Tensors of torch from and to those that stages send. Needs torch; imported only by code that has it."""

from __future__ import annotations

import torch

from klein_api.v1 import tensor_pb2
from klein_client.stages import PIXELS_PER_LATENT, VaeDecoder
from klein_client.tensors import Tensor

_DTYPES: dict[int, torch.dtype] = {
    tensor_pb2.DATA_TYPE_BF16: torch.bfloat16,
    tensor_pb2.DATA_TYPE_F16: torch.float16,
    tensor_pb2.DATA_TYPE_F32: torch.float32,
}
_DATA_TYPES = {dtype: data_type for data_type, dtype in _DTYPES.items()}


def to_torch(tensor: Tensor) -> torch.Tensor:
    """Returns a received tensor in torch's own memory, of its own element type."""
    flat = torch.frombuffer(bytearray(tensor.data), dtype=_DTYPES[tensor.data_type])
    return flat.view(tensor.shape)


def from_torch(tensor: torch.Tensor) -> Tensor:
    """Returns a tensor to be sent, copied from its device if needed.

    Raises:
        ValueError: it is not of bf16, f16 or f32, or is empty.
    """
    if tensor.dtype not in _DATA_TYPES:
        raise ValueError(f"tensors of {tensor.dtype} are not sent; only bf16, f16 and f32 are")
    host = tensor.detach().to("cpu").contiguous()
    # Flat first: a contiguous tensor whose last extent is 1 may have any stride there, which a view refuses.
    data = host.reshape(-1).view(torch.uint8).numpy().tobytes()
    return Tensor(_DATA_TYPES[tensor.dtype], tuple(host.shape), data)


def decoded(stage: VaeDecoder, latents: torch.Tensor) -> torch.Tensor:
    """Decodes packed, normalized latents, (batch, channels, rows, columns), one image a call.

    Returns:
        The pixels: uint8 (batch, height, width, 3), on the CPU.

    Raises:
        KleinError: a call failed.
        ValueError: the latents have another rank, another element type, or no elements.
    """
    if latents.ndim != 4 or not latents.numel():
        raise ValueError(
            f"the latents have shape {list(latents.shape)}; must be (batch, channels, rows, columns)"
        )
    size = (latents.shape[2] * PIXELS_PER_LATENT, latents.shape[3] * PIXELS_PER_LATENT, 3)
    images = [stage.decode(from_torch(each.permute(1, 2, 0))) for each in latents]
    return torch.stack([torch.frombuffer(image, dtype=torch.uint8).view(size) for image in images])
