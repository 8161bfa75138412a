"""Quantized weight of a layer: kept quantized in memory, and dequantized or multiplied as stored on use."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

Capability = tuple[int, int]
"""A CUDA device's compute capability, major and minor."""

_FLOAT8_SINCE: Capability = (8, 9)
_FLOAT4_SINCE: Capability = (10, 0)
_CHUNK_VALUES_CPU = 1 << 19
_CHUNK_VALUES_DEVICE = 1 << 24
"""Values that are dequantized at a time, so that fp32 intermediates stay small."""


class QuantizedWeight(nn.Module, ABC):
    """Quantized values and their scales, for a layer of outputs (rows) by inputs (columns).

    Codes are stored as bytes and scales as fp32; casting the model to another dtype leaves both as they are.

    Attributes:
        values: the codes, one row per output.
        scale: fp32 factor of all values (1,) or of each row (rows,).
        input_scale: fp32 (1,), the static scale of the layer's inputs; `None` measures it on each use.
        dtype: default dtype of `dense`.
        buffer: memory for the result of `dense`; the weights of a model share one.
        full_precision: the file asks for products in full precision on every device.
    """

    values: Tensor
    scale: Tensor
    input_scale: Tensor | None

    def __init__(
        self,
        values: Tensor,
        scale: Tensor,
        input_scale: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        full_precision: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("scale", scale.reshape(-1).float())
        self.register_buffer("input_scale", None if input_scale is None else input_scale.reshape(-1).float())
        self.dtype = dtype
        self.buffer = DequantBuffer()
        self.full_precision = full_precision

    @property
    @abstractmethod
    def columns(self) -> int:
        """Number of the layer's inputs."""

    @abstractmethod
    def decoded(self, start: int, stop: int) -> Tensor:
        """Returns rows start … stop in fp32, scaled."""

    @abstractmethod
    def cut(self, start: int, stop: int) -> Self:
        """Returns rows start … stop as another weight."""

    @classmethod
    @abstractmethod
    def stacked(cls, parts: Sequence[Self]) -> Self:
        """Returns one weight of all parts' rows, one below the other; a scale that all share stays one value."""

    @property
    def shape(self) -> torch.Size:
        """(outputs, inputs)."""
        return torch.Size((len(self.values), self.columns))

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def byte_count(self) -> int:
        """Bytes of values and scales."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.state_dict().values())

    def dense(self, dtype: torch.dtype | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns rows start … stop, dequantized in fp32 and rounded to `dtype`.

        The next call on any weight with the same buffer overwrites the result.
        """
        stop = len(self.values) if stop is None else stop
        if torch.compiler.is_compiling():
            return self.decoded(start, stop).to(dtype or self.dtype)
        dense = self.buffer.get((stop - start, self.columns), dtype or self.dtype, self.device)
        values = _CHUNK_VALUES_CPU if self.device.type == "cpu" else _CHUNK_VALUES_DEVICE
        count = max(values // max(self.columns, 1), 1)
        for first in range(start, stop, count):
            last = min(first + count, stop)
            dense[first - start : last - start].copy_(self.decoded(first, last))
        return dense

    def multiplies(self, tokens: Tensor, start: int, stop: int) -> bool:
        """Whether the tokens' device multiplies rows start … stop with tokens (…, inputs) as they are stored.

        Only for bfloat16 tokens: a model in fp32 is meant to be exact.
        """
        return (
            not self.full_precision
            and tokens.dtype == torch.bfloat16
            and not torch.is_grad_enabled()
            and self.fits(capability_of(tokens.device), start, stop)
        )

    def fits(self, capability: Capability | None, start: int, stop: int) -> bool:
        """Whether a device of that capability multiplies rows start … stop as they are stored."""
        return False

    def product(self, tokens: Tensor, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Returns tokens (count, inputs) · rows start … stop transposed, in bfloat16. Requires `fits`.

        Raises:
            NotImplementedError: no device multiplies this format as it is stored.
        """
        raise NotImplementedError(f"{type(self).__name__} is always dequantized")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the buffers as bytes, so that casting a model to another dtype does not round scales."""

        def moved(tensor: Tensor) -> Tensor:
            return fn(tensor.view(torch.uint8)).view(tensor.dtype)

        applied: Self = super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return applied

    def _scale_of(self, start: int, stop: int) -> Tensor:
        """Returns (1, 1) or (stop − start, 1)."""
        return (self.scale if len(self.scale) == 1 else self.scale[start:stop])[:, None]


class DequantBuffer:
    """Reusable memory for one dequantized layer; each call of `get` overwrites the result of the last one.

    Every thread has its own memory, as a thread computes one layer at a time. While gradients are recorded or a
    program is traced all values must persist, so each call allocates.
    """

    def __init__(self) -> None:
        self._buffers = _ThreadBuffers()

    def __deepcopy__(self, memo: dict[int, object]) -> DequantBuffer:
        """A copied model dequantizes its layers elsewhere."""
        return DequantBuffer()

    def get(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns an uninitialized matrix of that shape."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.empty(shape, dtype=dtype, device=device)
        buffers = self._buffers.by_kind
        size = shape[0] * shape[1]
        if (device, dtype) not in buffers or buffers[device, dtype].numel() < size:
            # Dropped first, so that the old and the new one never exist together.
            buffers.pop((device, dtype), None)
            buffers[device, dtype] = torch.empty(size, dtype=dtype, device=device)
        return buffers[device, dtype][:size].view(shape)


class _ThreadBuffers(threading.local):
    """One thread's memory."""

    def __init__(self) -> None:
        self.by_kind: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def share_buffer(module: nn.Module) -> None:
    """Makes all quantized weights of a model dequantize into one buffer."""
    buffer = DequantBuffer()
    for part in module.modules():
        if isinstance(part, QuantizedWeight):
            part.buffer = buffer


def stacked_scale(parts: Sequence[QuantizedWeight]) -> Tensor:
    """Returns the one scale that all parts share (1,), or one per row (rows,)."""
    scales = [part.scale for part in parts]
    if all(len(scale) == 1 and torch.equal(scale, scales[0]) for scale in scales):
        return scales[0]
    return torch.cat([scale.expand(len(part.values)) for part, scale in zip(parts, scales, strict=True)])


def stacked_input_scale(parts: Sequence[QuantizedWeight]) -> Tensor | None:
    """Returns the largest of the parts' static input scales, so that no part's inputs are clipped."""
    scales = [part.input_scale for part in parts if part.input_scale is not None]
    return torch.stack(scales).amax(dim=0) if len(scales) == len(parts) else None


def multiplies_float8(capability: Capability | None) -> bool:
    """Whether the tensor cores multiply 8-bit floats (Ada, Hopper and later); `None` is no CUDA device."""
    return capability is not None and capability >= _FLOAT8_SINCE


def multiplies_float4(capability: Capability | None) -> bool:
    """Whether the tensor cores multiply 4-bit floats with block scales (Blackwell), and torch exposes it."""
    return (
        capability is not None
        and capability >= _FLOAT4_SINCE
        and hasattr(torch, "_scaled_mm")
        and hasattr(torch, "float4_e2m1fn_x2")
    )


def capability_of(device: torch.device) -> Capability | None:
    """Returns the device's CUDA capability; `None` on others and on ROCm, whose 8-bit floats differ."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor


class QuantizedEmbedding(nn.Module):
    """Embedding table with a quantized weight: token ids (…) → (…, channels)."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        distinct, indices = torch.unique(ids, return_inverse=True)
        rows = [self.weight.decoded(token, token + 1) for token in distinct.tolist()]
        return torch.cat(rows).to(self.weight.dtype)[indices]


def set_weight(module: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Sets parameter `name` of `module` to `weight`; an embedding table becomes a `QuantizedEmbedding`.

    Other layers must support `QuantizedWeight` themselves, as `klein_core.linear.Linear` does.
    """
    path, _, parameter = name.rpartition(".")
    layer = module.get_submodule(path)
    if type(layer) is nn.Embedding:
        module.set_submodule(path, QuantizedEmbedding(weight))
    else:
        delattr(layer, parameter)
        setattr(layer, parameter, weight)
