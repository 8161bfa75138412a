"""Weights of blocks in the machine's memory, brought to the device one block ahead of their use.

The device holds two blocks, whatever the network's depth. While one computes, the next one is copied into the
place that the one before left. Values are copied as they are, quantized ones too, so results are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from klein_core.denoiser.transformer import FlowTransformer

PLACES = 2
"""Blocks on the device: the one that computes and the one that comes next."""
_ALIGNMENT = 256
"""Bytes; what CUDA's own allocations keep to, so that the same kernels are chosen."""


class CopyStream(Protocol):
    """Copies blocks to the device beside the computation, and keeps the two from overtaking each other."""

    def fill(self, place: int, room: Tensor, block: Tensor) -> None:
        """Begins to copy a block's bytes into a place's room, once whoever used that place is done."""

    def await_filled(self, place: int) -> None:
        """Lets the computation wait until the place is filled."""

    def mark_used(self, place: int) -> None:
        """Marks the point in the computation from which on the place may be filled anew."""


class CudaCopyStream:
    """A CUDA stream of its own; the processor never waits."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        new_event: Callable[[], torch.cuda.Event] = torch.cuda.Event
        self._filled = [new_event() for _ in range(PLACES)]
        self._used = [new_event() for _ in range(PLACES)]

    def fill(self, place: int, room: Tensor, block: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used[place])
            room.copy_(block, non_blocking=True)
            self._filled[place].record(self._stream)

    def await_filled(self, place: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._filled[place])

    def mark_used(self, place: int) -> None:
        self._used[place].record(torch.cuda.current_stream(self._device))


class SyncCopyStream:
    """Copies at once, where nothing runs beside the processor."""

    def fill(self, place: int, room: Tensor, block: Tensor) -> None:
        room.copy_(block)

    def await_filled(self, place: int) -> None:
        pass

    def mark_used(self, place: int) -> None:
        pass


def offload_blocks(
    transformer: FlowTransformer, device: torch.device | str, lane: CopyStream | None = None
) -> None:
    """Leaves the blocks' weights in the machine's memory, from where each step streams them to `device`.

    Args:
        transformer: loaded on the CPU, and not compiled. Everything but its blocks is moved to the device.
        device: where steps are computed.
        lane: how copies are made; `None` is a CUDA stream on CUDA.
    """
    device = torch.device(device)
    is_cuda = device.type == "cuda"
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    parked = [PinnedBlock.of(block, is_pinned=is_cuda) for block in blocks]
    for child in transformer.children():
        if child not in (transformer.transformer_blocks, transformer.single_transformer_blocks):
            child.to(device)
    lane = lane or (CudaCopyStream(device) if is_cuda else SyncCopyStream())
    BlockStream(parked, device, lane).attach(blocks)


@dataclass(frozen=True)
class Slice:
    """One tensor of a block, where it lies in the block's bytes."""

    table: dict[str, Any]
    """The owner's parameters or buffers."""
    name: str
    start: int
    shape: torch.Size
    dtype: torch.dtype
    is_parameter: bool

    def of(self, memory: Tensor) -> Tensor:
        """Returns this tensor in a block's bytes, as the owner keeps it."""
        byte_count = self.shape.numel() * self.dtype.itemsize
        view = memory[self.start : self.start + byte_count].view(self.dtype).view(self.shape)
        return nn.Parameter(view, requires_grad=False) if self.is_parameter else view

    def put(self, tensor: Tensor) -> None:
        """Makes `tensor` what the owner uses."""
        self.table[self.name] = tensor


@dataclass(frozen=True)
class PinnedBlock:
    """A block's tensors side by side in the machine's memory."""

    slices: tuple[Slice, ...]
    memory: Tensor
    """Bytes; pinned where a device copies from it."""

    @classmethod
    def of(cls, block: nn.Module, *, is_pinned: bool) -> PinnedBlock:
        """Moves a block's parameters and buffers into one piece of memory."""
        slices, start = [], 0
        for table, name, tensor in _tensors(block):
            is_parameter = isinstance(tensor, nn.Parameter)
            slices.append(Slice(table, name, start, tensor.shape, tensor.dtype, is_parameter))
            start += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        parked = cls(tuple(slices), torch.empty(start, dtype=torch.uint8, pin_memory=is_pinned))
        for piece in parked.slices:
            home = piece.of(parked.memory)
            home.detach().copy_(piece.table[piece.name])
            piece.put(home)
        return parked


class BlockStream:
    """Brings each block before it runs and the next one meanwhile.

    Args:
        parked: the blocks in the order in which they run.
        device: where they run.
        lane: makes the copies.
    """

    def __init__(self, parked: Sequence[PinnedBlock], device: torch.device, lane: CopyStream) -> None:
        largest = max(block.memory.numel() for block in parked)
        self._rooms = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(PLACES)]
        self._parked = tuple(parked)
        self._homes = [[piece.of(block.memory) for piece in block.slices] for block in parked]
        self._guests = [
            [[piece.of(room) for piece in block.slices] for room in self._rooms] for block in parked
        ]
        self._lane = lane
        self._place = 0
        self._ahead: int | None = None

    def attach(self, blocks: Sequence[nn.Module]) -> None:
        """Makes the blocks call this stream before and after they run."""
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, index=index: self.enter(index))
            # Also where the block fails: the next step must find it parked.
            block.register_forward_hook(lambda *_, index=index: self.leave(index), always_call=True)

    def enter(self, index: int) -> None:
        """Gives a block its weights on the device and begins to copy the next block's."""
        if self._ahead != index:
            # The first step, or the one after a step that failed.
            self._fill(index)
        self._place, place = 1 - self._place, self._place
        self._lane.await_filled(place)
        self._put(index, self._guests[index][place])
        self._fill((index + 1) % len(self._parked))

    def leave(self, index: int) -> None:
        """Takes a block's weights back to the machine's memory; nothing has to be copied for that."""
        self._put(index, self._homes[index])
        self._lane.mark_used(1 - self._place)

    def _fill(self, index: int) -> None:
        """Begins to copy a block into the place that is next."""
        memory = self._parked[index].memory
        with torch.inference_mode(False), torch.no_grad():
            self._lane.fill(self._place, self._rooms[self._place][: memory.numel()], memory)
        self._ahead = index

    def _put(self, index: int, tensors: Sequence[Tensor]) -> None:
        for piece, tensor in zip(self._parked[index].slices, tensors, strict=True):
            piece.put(tensor)


def _tensors(block: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    for module in block.modules():
        for table in (module._parameters, module._buffers):
            yield from ((table, name, tensor) for name, tensor in table.items() if tensor is not None)
