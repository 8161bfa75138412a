"""Block offloading: block weights stay in host memory and are streamed to the device one block ahead.

The device holds two blocks, at any depth of the network: while one computes, the next one is copied into the other
slot. Bytes are copied as they are stored, quantized weights included, so results are bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from klein_core.denoiser.transformer import FlowTransformer

SLOTS = 2
"""Double buffer on the device: one block computes while the next one is copied."""
_ALIGNMENT_BYTES = 256
"""Alignment of CUDA's own allocations; with the same alignment the same kernels are chosen."""


def offload_blocks(
    transformer: FlowTransformer, device: torch.device | str, copy_stream: CopyStream | None = None
) -> None:
    """Keeps the blocks' weights in host memory and streams them to `device` during each step.

    Args:
        transformer: loaded on the CPU. Everything but its blocks is moved to the device.
        device: where steps are computed.
        copy_stream: makes the copies; `None` is `CudaCopyStream` on CUDA, else `SyncCopyStream`.

    Raises:
        RuntimeError: the blocks are compiled.
    """
    if transformer.is_compiled:
        raise RuntimeError("compiled blocks cannot be offloaded")
    device = torch.device(device)
    is_cuda = device.type == "cuda"
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    pinned = [PinnedBlock.of(block, is_pinned=is_cuda) for block in blocks]
    for child in transformer.children():
        if child not in (transformer.transformer_blocks, transformer.single_transformer_blocks):
            child.to(device)
    copy_stream = copy_stream or (CudaCopyStream(device) if is_cuda else SyncCopyStream())
    BlockStream(pinned, device, copy_stream).attach(blocks)
    transformer.is_offloaded = True


class BlockStream:
    """Copies each block to the device before its forward pass, and prefetches the next one.

    Args:
        blocks: in execution order.
        device: where they compute.
        copy_stream: makes the copies.
    """

    def __init__(self, blocks: Sequence[PinnedBlock], device: torch.device, copy_stream: CopyStream) -> None:
        largest = max(block.memory.numel() for block in blocks)
        self._blocks = tuple(blocks)
        self._device_buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._host_tensors = [[view.of(block.memory) for view in block.views] for block in blocks]
        self._device_tensors = [
            [[view.of(buffer) for view in block.views] for buffer in self._device_buffers] for block in blocks
        ]
        """By block, then slot."""
        self._copy_stream = copy_stream
        self._slot = 0
        """The slot that is filled next."""
        self._prefetched: int | None = None
        """The block that was copied last."""

    def attach(self, modules: Sequence[nn.Module]) -> None:
        """Registers forward hooks on the blocks' modules, which must be in the same order as the blocks."""
        for index, module in enumerate(modules):
            module.register_forward_pre_hook(lambda *_, index=index: self.pre_forward(index))
            # After a failed forward pass too: the next step expects host tensors.
            module.register_forward_hook(lambda *_, index=index: self.post_forward(index), always_call=True)

    def pre_forward(self, index: int) -> None:
        """Switches a block to its weights on the device and starts to copy the next block's."""
        if self._prefetched != index:
            # The first step, or the first one after a failed step.
            self._fill(index)
        self._slot, slot = 1 - self._slot, self._slot
        self._copy_stream.wait_ready(slot)
        self._assign(index, self._device_tensors[index][slot])
        self._fill((index + 1) % len(self._blocks))

    def post_forward(self, index: int) -> None:
        """Switches a block back to its weights in host memory, which needs no copy."""
        self._assign(index, self._host_tensors[index])
        self._copy_stream.record_free(1 - self._slot)

    def _fill(self, index: int) -> None:
        """Starts to copy a block into the next slot."""
        memory = self._blocks[index].memory
        with torch.inference_mode(False), torch.no_grad():
            buffer = self._device_buffers[self._slot]
            self._copy_stream.fill(self._slot, buffer[: memory.numel()], memory)
        self._prefetched = index

    def _assign(self, index: int, tensors: Sequence[Tensor]) -> None:
        for view, tensor in zip(self._blocks[index].views, tensors, strict=True):
            view.assign(tensor)


@dataclass(frozen=True)
class PinnedBlock:
    """A block's tensors, contiguous in host memory."""

    views: tuple[TensorView, ...]
    memory: Tensor
    """Bytes; pinned for copies to CUDA."""

    @classmethod
    def of(cls, block: nn.Module, *, is_pinned: bool) -> PinnedBlock:
        """Moves a block's parameters and buffers into one allocation."""
        views, start = [], 0
        for table, name, tensor in _tensors(block):
            is_parameter = isinstance(tensor, nn.Parameter)
            views.append(TensorView(table, name, start, tensor.shape, tensor.dtype, is_parameter))
            start += -(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        pinned = cls(tuple(views), torch.empty(start, dtype=torch.uint8, pin_memory=is_pinned))
        for view in pinned.views:
            host_tensor = view.of(pinned.memory)
            host_tensor.detach().copy_(view.table[view.name])
            view.assign(host_tensor)
        return pinned


@dataclass(frozen=True)
class TensorView:
    """One tensor of a block: its location in the block's bytes, and the module attribute that holds it."""

    table: dict[str, Any]
    """The module's `_parameters` or `_buffers`."""
    name: str
    start: int
    """Offset in bytes."""
    shape: torch.Size
    dtype: torch.dtype
    is_parameter: bool

    def of(self, memory: Tensor) -> Tensor:
        """Returns this tensor as a view of a block's bytes, as a parameter if the module has one."""
        byte_count = self.shape.numel() * self.dtype.itemsize
        view = memory[self.start : self.start + byte_count].view(self.dtype).view(self.shape)
        return nn.Parameter(view, requires_grad=False) if self.is_parameter else view

    def assign(self, tensor: Tensor) -> None:
        """Sets the module's attribute to `tensor`."""
        self.table[self.name] = tensor


class CopyStream(Protocol):
    """Copies blocks to the device concurrently with computation, and orders the two by slot."""

    def fill(self, slot: int, buffer: Tensor, block: Tensor) -> None:
        """Starts to copy a block's bytes into a slot's buffer, after the slot's last reader has finished."""

    def wait_ready(self, slot: int) -> None:
        """Makes the computation wait until the slot is filled."""

    def record_free(self, slot: int) -> None:
        """Marks the point in the computation after which the slot may be overwritten."""


class CudaCopyStream:
    """Copies on a separate CUDA stream; the CPU never waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        new_event: Callable[[], torch.cuda.Event] = torch.cuda.Event
        self._ready = [new_event() for _ in range(SLOTS)]
        self._free = [new_event() for _ in range(SLOTS)]

    def fill(self, slot: int, buffer: Tensor, block: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._free[slot])
            buffer.copy_(block, non_blocking=True)
            self._ready[slot].record(self._stream)

    def wait_ready(self, slot: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._ready[slot])

    def record_free(self, slot: int) -> None:
        self._free[slot].record(torch.cuda.current_stream(self._device))


class SyncCopyStream:
    """Copies synchronously, for CPU tests."""

    def fill(self, slot: int, buffer: Tensor, block: Tensor) -> None:
        buffer.copy_(block)

    def wait_ready(self, slot: int) -> None:
        pass

    def record_free(self, slot: int) -> None:
        pass


def _tensors(block: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Yields each parameter and buffer with the dictionary and the name under which its module holds it."""
    for module in block.modules():
        for table in (module._parameters, module._buffers):
            yield from ((table, name, tensor) for name, tensor in table.items() if tensor is not None)
