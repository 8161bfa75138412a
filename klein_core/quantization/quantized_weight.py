"""A layer's matrix that stays quantized in memory and is unfolded, or multiplied as it is, when it is used."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

_CHUNK_VALUES_CPU = 1 << 19
_CHUNK_VALUES_DEVICE = 1 << 24


class QuantizedWeight(nn.Module, ABC):
    """Quantized values and their scales, for a layer of outputs (rows) by inputs (columns).

    What is stored are bytes and fp32 scales; a bfloat16 model is not a reason to cast them.

    Attributes:
        values: bytes of the codes, one row an output.
        scale: fp32 factor of all values (1,) or of each row's (rows,).
        input_scale: fp32 (1,), the static scale of the layer's inputs; `None` is measured at each use.
        dtype: what `dense` gives unless it is told otherwise.
        buffer: where `dense` unfolds; a model's weights share one.
        full_precision: the file asks for products in full precision, whatever the device can do.
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
        """Inputs of the layer."""

    @abstractmethod
    def decoded(self, start: int, stop: int) -> Tensor:
        """Returns rows start … stop in fp32, scaled."""

    @abstractmethod
    def cut(self, start: int, stop: int) -> Self:
        """Returns rows start … stop as a weight of their own."""

    @classmethod
    @abstractmethod
    def stacked(cls, parts: Sequence[Self]) -> Self:
        """Returns the parts' rows one under another; a scale that all share stays one."""

    @property
    def shape(self) -> torch.Size:
        """(outputs, inputs)."""
        return torch.Size((len(self.values), self.columns))

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def byte_count(self) -> int:
        """Bytes of all that is stored."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.state_dict().values())

    def dense(self, dtype: torch.dtype | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns rows start … stop, dequantized in fp32 and rounded to `dtype`.

        The result is lent: the next call on any weight with the same buffer overwrites it.
        """
        stop = len(self.values) if stop is None else stop
        if torch.compiler.is_compiling():
            return self.decoded(start, stop).to(dtype or self.dtype)
        lent = self.buffer.lend((stop - start, self.columns), dtype or self.dtype, self.device)
        count = self._rows_at_once()
        for first in range(start, stop, count):
            last = min(first + count, stop)
            lent[first - start : last - start].copy_(self.decoded(first, last))
        return lent

    def multiplies(self, tokens: Tensor, start: int, stop: int) -> bool:
        """Whether this device multiplies rows start … stop with tokens (…, inputs) as they are stored.

        Only for bfloat16 tokens: a model run in fp32 is meant to be exact.
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
        """Returns tokens (count, inputs) · rows start … stop transposed, where `fits` says that this is possible.

        Raises:
            NotImplementedError: no device multiplies this kind as it is stored.
        """
        raise NotImplementedError(f"{type(self).__name__} is only ever unfolded")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves what is stored, as bytes: casting a model to another type must not round scales."""

        def moved(tensor: Tensor) -> Tensor:
            return fn(tensor.view(torch.uint8)).view(tensor.dtype)

        applied: Self = super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return applied

    def _rows_at_once(self) -> int:
        """Rows dequantized at a time, so that fp32 intermediates stay small."""
        values = _CHUNK_VALUES_CPU if self.device.type == "cpu" else _CHUNK_VALUES_DEVICE
        return max(values // max(self.columns, 1), 1)

    def _scale_of(self, start: int, stop: int) -> Tensor:
        """Returns (1, 1) or (stop − start, 1)."""
        return (self.scale if len(self.scale) == 1 else self.scale[start:stop])[:, None]


def stacked_scale(parts: Sequence[QuantizedWeight]) -> Tensor:
    """Returns the one scale that all parts share (1,), or one a row."""
    scales = [part.scale for part in parts]
    if all(len(scale) == 1 and torch.equal(scale, scales[0]) for scale in scales):
        return scales[0]
    return torch.cat([scale.expand(len(part.values)) for part, scale in zip(parts, scales, strict=True)])


def stacked_input_scale(parts: Sequence[QuantizedWeight]) -> Tensor | None:
    """Returns the widest of the parts' static input scales, so that no part's inputs are cut off."""
    scales = [part.input_scale for part in parts if part.input_scale is not None]
    return torch.stack(scales).amax(dim=0) if len(scales) == len(parts) else None


def share_buffer(module: nn.Module) -> None:
    """Lets all quantized weights of a model unfold into one buffer."""
    buffer = DequantBuffer()
    for part in module.modules():
        if isinstance(part, QuantizedWeight):
            part.buffer = buffer


class _Rooms(threading.local):
    """What one thread unfolds into, by device and type."""

    def __init__(self) -> None:
        self.rooms: dict[tuple[torch.device, torch.dtype], Tensor] = {}


class DequantBuffer:
    """Lends room for one dequantized layer; the next loan overwrites the last one.

    A thread computes one layer at a time; each has rooms of its own. While gradients are recorded or a program is
    traced every value has to stay, and each loan is memory of its own.
    """

    def __init__(self) -> None:
        self._of_thread = _Rooms()

    def __deepcopy__(self, memo: dict[int, object]) -> DequantBuffer:
        """A copied model unfolds its layers elsewhere."""
        return DequantBuffer()

    def lend(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a matrix of that shape, holding whatever was there before."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.empty(shape, dtype=dtype, device=device)
        rooms = self._of_thread.rooms
        size = shape[0] * shape[1]
        if (device, dtype) not in rooms or rooms[device, dtype].numel() < size:
            # Dropped first, so that the old and the new one never exist together.
            rooms.pop((device, dtype), None)
            rooms[device, dtype] = torch.empty(size, dtype=dtype, device=device)
        return rooms[device, dtype][:size].view(shape)


Capability = tuple[int, int]
"""A CUDA device's compute capability, major and minor."""

_FLOAT8_SINCE: Capability = (8, 9)
_FLOAT4_SINCE: Capability = (10, 0)


def multiplies_float8(capability: Capability | None) -> bool:
    """Whether the tensor cores take 8-bit floats (Ada, Hopper and later); `None` is no CUDA device."""
    return capability is not None and capability >= _FLOAT8_SINCE


def multiplies_float4(capability: Capability | None) -> bool:
    """Whether the tensor cores take 4-bit floats with block scales (Blackwell), and torch offers it."""
    return (
        capability is not None
        and capability >= _FLOAT4_SINCE
        and hasattr(torch, "_scaled_mm")
        and hasattr(torch, "float4_e2m1fn_x2")
    )


def capability_of(device: torch.device) -> Capability | None:
    """Returns the device's CUDA capability; `None` elsewhere, also on ROCm, whose 8-bit floats are others."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor


class QuantizedEmbedding(nn.Module):
    """Stands where an embedding table stood: token numbers (…) → (…, channels)."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, numbers: Tensor) -> Tensor:
        distinct, places = torch.unique(numbers, return_inverse=True)
        rows = [self.weight.decoded(number, number + 1) for number in distinct.tolist()]
        return torch.cat(rows).to(self.weight.dtype)[places]


def set_weight(module: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Makes `weight` the parameter `name` of `module`, whose layer knows it; an embedding table is replaced."""
    path, _, parameter = name.rpartition(".")
    layer = module.get_submodule(path)
    if type(layer) is nn.Embedding:
        module.set_submodule(path, QuantizedEmbedding(weight))
    else:
        delattr(layer, parameter)
        setattr(layer, parameter, weight)
