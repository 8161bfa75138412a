"""Quantized weights: their dequantized values, and the products that a device computes from stored weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.peak_memory import traced_peak
from klein_core.linear import Linear
from klein_core.memory import precision
from klein_core.quantization import fp8, nvfp4, quantized_weight
from klein_core.quantization.fp8 import Float8Weight, Int8Weight, is_finite
from klein_core.quantization.nvfp4 import Float4Weight, quantized_inputs, swizzled, unswizzled
from klein_core.quantization.quantized_weight import QuantizedWeight, set_weight, share_buffer
from tests.tiny.quantized import (
    Quantized,
    tiled,
    write_float8,
    write_int8,
    write_modelopt_nvfp4,
    write_nvfp4,
    write_smoothed_nvfp4,
)
from tests.tiny.transformer import relative_error

HOPPER, BLACKWELL, AMPERE = (9, 0), (10, 0), (8, 6)


def float8(file: Quantized) -> QuantizedWeight:
    return Float8Weight(file.tensors["weight"], file.tensors["weight_scale"], file.tensors.get("input_scale"))


def nvfp4_weight(file: Quantized) -> QuantizedWeight:
    tensors = file.tensors
    return Float4Weight(
        tensors["weight"],
        tensors["weight_scale"],
        tensors["weight_scale_2"],
        tensors.get("input_scale"),
    )


def modelopt(file: Quantized) -> QuantizedWeight:
    tensors = file.tensors
    return Float4Weight.from_linear(
        tensors["weight"],
        tensors["weight_scale"],
        tensors["weight_scale_2"],
        tensors.get("input_scale"),
    )


def smoothed(file: Quantized) -> QuantizedWeight:
    weight = nvfp4_weight(file)
    weight.smoothing = file.tensors["pre_quant_scale"]
    return weight


def int8(file: Quantized) -> QuantizedWeight:
    return Int8Weight(file.tensors["weight"], file.tensors["weight_scale"])


KINDS: dict[str, tuple[Callable[..., Quantized], Callable[[Quantized], QuantizedWeight]]] = {
    "fp8": (write_float8, float8),
    "fp8 a row": (lambda weight: write_float8(weight, per_row=True), float8),
    "nvfp4": (write_nvfp4, nvfp4_weight),
    "modelopt nvfp4": (write_modelopt_nvfp4, modelopt),
    "smoothed nvfp4": (write_smoothed_nvfp4, smoothed),
    "int8": (write_int8, int8),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Rows of very different sizes, so that a scale of another row shows.
    sizes = 10 ** (torch.rand(rows, 1, generator=generator) * 2 - 1)
    return torch.randn(rows, columns, generator=generator) * sizes


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


@each_kind
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 300), st.integers(1, 9), st.data())
def test_any_rows_dequantize_to_the_written_values(kind: str, rows: int, blocks: int, data: st.DataObject):
    write, read = KINDS[kind]
    file = write(matrix(rows, 16 * blocks))
    stored = read(file)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    assert stored.shape == (rows, 16 * blocks)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(stored.dense(dtype), file.values.to(dtype))
        assert torch.equal(stored.dense(dtype, start, stop), file.values[start:stop].to(dtype))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "smoothed nvfp4"])
def test_cut_and_stacked_parts_keep_their_own_scales(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quantized_weight, "_CHUNK_VALUES_CPU", 640)
    write, read = KINDS[kind]
    files = [write(matrix(rows, 32, seed) * 10**seed) for seed, rows in enumerate((130, 40, 7))]
    parts = [read(file) for file in files]
    together = type(parts[0]).stacked(parts)
    values = torch.cat([file.values for file in files])
    assert torch.equal(together.dense(torch.float32), values)
    assert torch.equal(together.cut(100, 150).dense(torch.float32), values[100:150])
    # A final layer's halves change places in one of the layouts.
    exchanged = type(together).stacked([together.cut(90, 177), together.cut(0, 90)])
    assert torch.equal(exchanged.dense(torch.float32), values.roll(-90, dims=0))


def test_parts_of_one_matrix_share_its_scale_again():
    whole = float8(write_float8(matrix(48, 32)))
    assert isinstance(whole, Float8Weight)
    again = Float8Weight.stacked([whole.cut(0, 16), whole.cut(16, 32), whole.cut(32, 48)])
    assert again.scale.shape == (1,)
    assert torch.equal(again.input_scale, whole.input_scale)


@given(st.integers(1, 400), st.integers(1, 40), st.data())
@settings(max_examples=30, deadline=None)
def test_swizzling_is_the_written_layout_and_undone(rows: int, columns: int, data: st.DataObject):
    scales = torch.arange(rows * columns).remainder(251).to(torch.uint8).view(rows, columns)
    tiles = swizzled(scales)
    assert torch.equal(tiles, tiled(scales).view(torch.uint8))
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    assert torch.equal(unswizzled(tiles, columns, start, stop), scales[start:stop])


def test_four_bit_floats_round_to_the_nearest_and_ties_to_the_even_code():
    exact = torch.tensor([[*nvfp4.MAGNITUDES, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0]])
    rounded = torch.tensor([[*nvfp4.MAGNITUDES, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]])
    table = nvfp4.pair_table("cpu")
    assert torch.equal(nvfp4.decoded(nvfp4.encoded(exact), table), rounded)
    assert torch.equal(nvfp4.decoded(nvfp4.encoded(-exact), table), -rounded)


@each_kind
def test_a_layer_gives_what_it_gives_with_the_dequantized_matrix(kind: str):
    write, read = KINDS[kind]
    file = write(matrix(48, 32))
    tokens = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    stored, dense = Linear(32, 48), Linear(32, 48)
    set_weight(stored, "weight", read(file))
    dense.weight.copy_(file.values)
    for dtype in (torch.float32, torch.bfloat16):
        dense.to(dtype)
        inputs = tokens.to(dtype)
        assert torch.equal(stored(inputs), dense(inputs))
        assert torch.equal(stored.rows(inputs, 8, 40), dense.rows(inputs, 8, 40))
        out = torch.empty(2, 5, 48, dtype=dtype)
        assert stored(inputs, out).data_ptr() == out.data_ptr()
        assert torch.equal(out, dense(inputs))


@each_kind
def test_casting_a_model_leaves_what_is_stored(kind: str):
    write, read = KINDS[kind]
    file = write(matrix(16, 32))
    layer = Linear(32, 16)
    set_weight(layer, "weight", read(file))
    layer.to(torch.bfloat16)
    assert torch.equal(layer.weight.dense(torch.float32), file.values)


def test_one_buffer_as_large_as_the_largest_layer_serves_all():
    layers = torch.nn.ModuleList([Linear(32, 64), Linear(32, 16)])
    for seed, layer in enumerate(layers):
        set_weight(layer, "weight", Float8Weight.of(matrix(layer.out_features, 32, seed)))
    share_buffer(layers)
    first, second = (layer.weight.dense(torch.float32) for layer in layers)
    assert first.data_ptr() == second.data_ptr()
    with torch.enable_grad():
        assert layers[0].weight.dense(torch.float32).data_ptr() != first.data_ptr()


@pytest.mark.parametrize("element", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_eight_bit_float_is_what_torch_says(element: torch.dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes[codes.view(element).float().isfinite()]
    assert is_finite(finite, element)
    assert all(not is_finite(code[None], element) for code in codes if code not in finite)
    scale = torch.tensor([0.0123])
    stored = Float8Weight(finite[None], scale, element=element)
    assert torch.equal(stored.dense(torch.float32), finite[None].view(element).float() * scale)


def test_which_products_a_device_computes_itself():
    eight, four = float8(write_float8(matrix(256, 32))), nvfp4_weight(write_nvfp4(matrix(256, 32)))
    for capability, takes_eight, takes_four in [
        (None, False, False),
        (AMPERE, False, False),
        ((8, 9), True, False),
        (HOPPER, True, False),
        (BLACKWELL, True, True),
        ((12, 0), True, True),
    ]:
        assert eight.fits(capability, 0, 256) is takes_eight
        assert four.fits(capability, 0, 256) is takes_four
        assert int8(write_int8(matrix(256, 32))).fits(capability, 0, 256) is False
    # Tensor cores want whole groups of sixteen, and scales whole tiles.
    assert not eight.fits(BLACKWELL, 8, 256)
    assert not float8(write_float8(matrix(256, 24))).fits(BLACKWELL, 0, 256)
    assert not float8(write_float8(matrix(250, 32))).fits(BLACKWELL, 0, 250)
    assert not four.fits(BLACKWELL, 16, 256)
    assert four.fits(BLACKWELL, 128, 144)
    assert not nvfp4_weight(write_nvfp4(matrix(256, 48))).fits(BLACKWELL, 0, 256)
    wide = Float8Weight(matrix(256, 32).to(torch.float8_e5m2), torch.ones(1), element=torch.float8_e5m2)
    assert not wide.fits(BLACKWELL, 0, 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_only_bfloat16_tokens_are_multiplied_in_eight_bits(dtype: torch.dtype, on_device: None):
    stored = float8(write_float8(matrix(32, 32)))
    assert stored.multiplies(torch.zeros(1, 32, dtype=torch.bfloat16), 0, 32)
    assert not stored.multiplies(torch.zeros(1, 32, dtype=dtype), 0, 32)
    stored.full_precision = True
    assert not stored.multiplies(torch.zeros(1, 32, dtype=torch.bfloat16), 0, 32)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the processor pass for a Blackwell device: torch multiplies 8-bit floats there too, only slowly."""
    monkeypatch.setattr(quantized_weight, "capability_of", lambda device: BLACKWELL)


@pytest.mark.parametrize("per_row", [False, True], ids=["one scale", "a scale a row"])
@pytest.mark.parametrize("input_scale", [4 / 448, None], ids=["static", "measured"])
def test_eight_bit_products(per_row: bool, input_scale: float | None, on_device: None):
    file = write_float8(matrix(64, 128), per_row=per_row, input_scale=input_scale)
    layer = Linear(128, 64)
    set_weight(layer, "weight", float8(file))
    tokens = torch.randn(3, 7, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = tokens.float() @ file.values.t()
    result = layer(tokens)
    assert result.dtype == torch.bfloat16
    assert not torch.equal(result, exact.bfloat16())
    # A float with three mantissa bits is off by at most 1/16; the errors of many partly cancel.
    assert relative_error(result, exact) < 0.04
    assert torch.equal(layer.rows(tokens, 16, 48), result[..., 16:48])
    out = torch.empty_like(result)
    assert torch.equal(layer(tokens, out), result)
    assert torch.equal(out, result)


def test_a_token_does_not_change_its_neighbors_in_eight_bits(on_device: None):
    layer = Linear(64, 32)
    set_weight(layer, "weight", Float8Weight.of(matrix(32, 64)))
    tokens = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    louder = tokens.clone()
    louder[3] *= 1000
    assert torch.equal(layer(tokens)[:3], layer(louder)[:3])


def test_four_bit_inputs_are_near_what_they_stand_for():
    tokens = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    scale = tokens.abs().amax(dim=1, keepdim=True) / (448 * 6)
    packed, block_scales = quantized_inputs(tokens, scale)
    values = nvfp4.decoded(packed, nvfp4.pair_table("cpu")).view(5, 4, 16)
    scales = block_scales.view(torch.float8_e4m3fn).float() * scale
    assert relative_error((values * scales[..., None]).view(5, 64), tokens) < 0.12
    silent, _ = quantized_inputs(torch.zeros(1, 32), torch.ones(1, 1))
    assert not silent.any()


def multiply_float4(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *, out_dtype: torch.dtype
) -> Tensor:
    """Does what the tensor cores do with four-bit floats, element by element."""
    table = nvfp4.pair_table("cpu")
    left, right = (nvfp4.decoded(side.contiguous().view(torch.uint8), table) for side in (a, b.t()))
    result = []
    for side, tiles in ((left, scale_a), (right, scale_b)):
        blocks = side.shape[1] // 16
        scales = unswizzled(tiles.view(-1, -(-blocks // 4) * 4), blocks, 0, len(side))
        result.append(side * scales.view(torch.float8_e4m3fn).float().repeat_interleave(16, dim=1))
    assert len(scale_a) == -(-len(left) // 128) * 128 * -(-left.shape[1] // 64) * 4
    return (result[0] @ result[1].t()).to(out_dtype)


def test_smoothed_inputs_are_multiplied_before_they_are_quantized(
    on_device: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "_scaled_mm", multiply_float4)
    file = write_smoothed_nvfp4(matrix(128, 64))
    weight = smoothed(file)
    weight.input_scale = None
    tokens = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = tokens.float() @ file.values.t()
    assert relative_error(weight.product(tokens, 0, 128), exact) < 0.15
    assert torch.equal(weight.cut(16, 48).dense(torch.float32), file.values[16:48])


@pytest.mark.parametrize("layout", ["nvfp4", "modelopt nvfp4"])
@pytest.mark.parametrize("input_scale", [4 / (448 * 6), None], ids=["static", "measured"])
def test_four_bit_products(
    layout: str, input_scale: float | None, on_device: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "_scaled_mm", multiply_float4)
    write, read = KINDS[layout]
    file = write(matrix(256, 96), input_scale=input_scale)
    layer = Linear(96, 256)
    set_weight(layer, "weight", read(file))
    tokens = torch.randn(2, 70, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    result, exact = layer(tokens), tokens.float() @ file.values.t()
    assert result.dtype == torch.bfloat16
    assert relative_error(result, exact) < 0.15
    assert torch.equal(layer.rows(tokens, 128, 256), result[..., 128:])
    out = torch.empty_like(result)
    assert torch.equal(layer(tokens, out), result)
    assert torch.equal(out, result)


def uncomputed(a: Tensor, b: Tensor, *scales: Tensor, out_dtype: torch.dtype, **_: object) -> Tensor:
    return torch.zeros(len(a), b.shape[1], dtype=out_dtype)


@pytest.mark.parametrize("room", [1 << 14, 1 << 30], ids=["in parts", "at once"])
@pytest.mark.parametrize(
    ("kind", "input_scale"), [("fp8", None), ("fp8", 0.1), ("nvfp4", None), ("nvfp4", 0.1)], ids=str
)
def test_quantizing_inputs_takes_no_more_than_is_planned(
    kind: str, input_scale: float | None, room: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "_scaled_mm", uncomputed)
    for module in (fp8, nvfp4, precision):
        for name in ("FLOAT8_CHUNK_VALUES", "FLOAT4_CHUNK_VALUES"):
            monkeypatch.setattr(module, name, room, raising=False)
    write, read = KINDS[kind]
    weight = read(write(matrix(16, 1024), input_scale=input_scale))
    tokens = torch.randn(512, 1024).bfloat16()
    product_bytes = 512 * 16 * 2
    planned = precision.PRECISIONS[kind].input_bytes(tokens.numel()) + product_bytes
    assert traced_peak(lambda: weight.product(tokens, 0, 16)) <= 1.05 * planned


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_inputs_quantized_in_parts_are_the_same(kind: str, on_device: None, monkeypatch: pytest.MonkeyPatch):
    if kind == "nvfp4":
        monkeypatch.setattr(torch, "_scaled_mm", multiply_float4)
    write, read = KINDS[kind]
    tokens = torch.randn(70, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    for input_scale in (None, 0.01):
        weight = read(write(matrix(256, 64), input_scale=input_scale))
        whole = weight.product(tokens, 0, 256)
        with monkeypatch.context() as patch:
            patch.setattr(fp8, "FLOAT8_CHUNK_VALUES", 640)
            patch.setattr(nvfp4, "FLOAT4_CHUNK_VALUES", 640)
            assert torch.equal(weight.product(tokens, 0, 256), whole)


def test_the_processor_multiplies_nothing_as_it_is_stored():
    assert quantized_weight.capability_of(torch.device("cpu")) is None
    assert not float8(write_float8(matrix(32, 32))).multiplies(torch.zeros(1, 32).bfloat16(), 0, 32)
