"""Block offloading: the same bits, two blocks on the device, each copied while the one before it computes."""

from __future__ import annotations

import pytest
import torch

from klein_core.checkpoint.weights import weights_digest
from klein_core.denoiser.offload import SLOTS, SyncCopyStream, offload_blocks
from klein_core.linear import Linear
from klein_core.quantization.fp8 import Float8Weight, Int8Weight
from klein_core.quantization.nvfp4 import Float4Weight
from klein_core.quantization.quantized_weight import set_weight, share_buffer
from tests.tiny.transformer import random_span, tiny_oracle, twin

BLOCKS = 5


class RecordingStream(SyncCopyStream):
    """Records the order of events, and the buffer of each slot."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.buffers: dict[int, int] = {}

    def fill(self, slot, buffer, block) -> None:
        self.events.append(("fill", slot))
        self.buffers[slot] = buffer.data_ptr()
        super().fill(slot, buffer, block)

    def wait_ready(self, slot) -> None:
        self.events.append(("run", slot))

    def record_free(self, slot) -> None:
        self.events.append(("done", slot))


def network(weight_kind=None):
    ours = twin(tiny_oracle())
    if weight_kind is not None:
        for name, layer in list(ours.named_modules()):
            if isinstance(layer, Linear) and "transformer_blocks" in name:
                set_weight(ours, f"{name}.weight", weight_kind(layer.weight.detach()))
        share_buffer(ours)
    return ours


def nvfp4(weight):
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(rows)
    values = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, columns // 16, generator=generator).add(0.5).to(torch.float8_e4m3fn)
    return Float4Weight.from_linear(values, scales, torch.tensor([0.1]))


def step(model):
    with torch.inference_mode():
        return model([random_span([(4, 6), (3, 3)]), random_span([(4, 4)], sigma=0.2, seed=1)])


@pytest.mark.parametrize(
    "weight_kind", [None, Float8Weight.of, Int8Weight.of, nvfp4], ids=["plain", "fp8", "int8", "nvfp4"]
)
def test_streamed_blocks_give_the_same_bits(weight_kind):
    model = network(weight_kind)
    expected, digest = step(model), weights_digest(model)
    offload_blocks(model, "cpu")
    for _ in range(3):
        for found, wanted in zip(step(model), expected, strict=True):
            assert torch.equal(found, wanted)
    assert weights_digest(model) == digest


def test_the_next_block_is_copied_before_a_block_is_done():
    model, stream = network(), RecordingStream()
    offload_blocks(model, "cpu", stream)
    step(model)
    first, *rest = stream.events
    assert first == ("fill", 0)
    expected = []
    for index in range(BLOCKS):
        slot, other = index % SLOTS, (index + 1) % SLOTS
        expected += [("run", slot), ("fill", other), ("done", slot)]
    assert rest == expected
    stream.events.clear()
    step(model)
    # The first block was copied during the last one of the step before.
    assert stream.events[0] == ("run", BLOCKS % SLOTS)
    assert stream.events.count(("fill", 0)) + stream.events.count(("fill", 1)) == BLOCKS


def test_a_block_computes_with_what_was_copied_and_no_more_than_two_are_there():
    model, stream, seen = network(), RecordingStream(), []
    offload_blocks(model, "cpu", stream)
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]

    def look(block, *_):
        pointers = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
        seen.append(pointers)

    for block in blocks:
        block.register_forward_pre_hook(look)
    step(model)
    assert all(len(pointers) == 1 for pointers in seen)
    on_device = set.union(*seen)
    assert on_device == set(stream.buffers.values())
    assert len(on_device) == SLOTS
    on_host = {parameter.untyped_storage().data_ptr() for block in blocks for parameter in block.parameters()}
    assert len(on_host) == BLOCKS
    assert not on_host & on_device


def test_a_step_that_failed_leaves_the_next_one_correct():
    model = network()
    expected = step(model)
    offload_blocks(model, "cpu")
    broken = model.single_transformer_blocks[0].register_forward_hook(_fail)
    with pytest.raises(ZeroDivisionError):
        step(model)
    broken.remove()
    for found, wanted in zip(step(model), expected, strict=True):
        assert torch.equal(found, wanted)


def _fail(*_):
    raise ZeroDivisionError


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("weight_kind", [None, Float8Weight.of], ids=["plain", "fp8"])
def test_streaming_to_a_gpu_gives_the_bits_of_weights_that_stay_there(weight_kind):
    resident, streamed = network(weight_kind).to("cuda"), network(weight_kind)
    expected = step(resident)
    offload_blocks(streamed, "cuda")
    assert all(parameter.is_pinned() for parameter in streamed.transformer_blocks.parameters())
    before = torch.cuda.memory_allocated()
    for _ in range(4):
        for found, wanted in zip(step(streamed), expected, strict=True):
            assert torch.equal(found, wanted)
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
