"""A layer's matrix that stays quantised in memory and is unfolded, or multiplied as it is, when it is used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from klein_core.quantization.buffer import DenseBuffer
from klein_core.quantization.devices import Capability, capability_of

_CHUNK_VALUES_CPU = 1 << 19
_CHUNK_VALUES_DEVICE = 1 << 24


class StoredWeight(nn.Module, ABC):
    """Quantised values and their scales, for a layer of outputs (rows) by inputs (columns).

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
        self.buffer = DenseBuffer()
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
        """Returns rows start … stop, dequantised in fp32 and rounded to `dtype`.

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
        """Rows dequantised at a time, so that fp32 intermediates stay small."""
        values = _CHUNK_VALUES_CPU if self.device.type == "cpu" else _CHUNK_VALUES_DEVICE
        return max(values // max(self.columns, 1), 1)

    def _scale_of(self, start: int, stop: int) -> Tensor:
        """Returns (1, 1) or (stop − start, 1)."""
        return (self.scale if len(self.scale) == 1 else self.scale[start:stop])[:, None]


def stacked_scale(parts: Sequence[StoredWeight]) -> Tensor:
    """Returns the one scale that all parts share (1,), or one a row."""
    scales = [part.scale for part in parts]
    if all(len(scale) == 1 and torch.equal(scale, scales[0]) for scale in scales):
        return scales[0]
    return torch.cat([scale.expand(len(part.values)) for part, scale in zip(parts, scales, strict=True)])


def stacked_input_scale(parts: Sequence[StoredWeight]) -> Tensor | None:
    """Returns the widest of the parts' static input scales, so that no part's inputs are cut off."""
    scales = [part.input_scale for part in parts if part.input_scale is not None]
    return torch.stack(scales).amax(dim=0) if len(scales) == len(parts) else None


def share_buffer(module: nn.Module) -> None:
    """Lets all quantised weights of a model unfold into one buffer."""
    buffer = DenseBuffer()
    for part in module.modules():
        if isinstance(part, StoredWeight):
            part.buffer = buffer
