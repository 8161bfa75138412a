"""Memory plan: weights to the byte, activations within a tenth of what torch allocates, and what fits where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from benchmarks.peak_memory import traced_peak
from benchmarks.random_modules import Place, cut_text_encoder, encode_run
from benchmarks.shapes import Shape, qwen3
from klein_core import linear
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.memory import weight_bytes
from klein_core.memory.activation_bytes import (
    StepShape,
    decode_bytes,
    encode_bytes,
    prompt_activations,
    step_activations,
    tile_size_px,
)
from klein_core.memory.plan import PROCESS_BYTES, PlannedModel, StageMemory, Workload, make_plan
from klein_core.memory.precision import PRECISIONS
from klein_core.model_registry import PUBLISHED_MODELS, SMALL_DECODER
from klein_core.vae_decoder.autoencoder import Autoencoder
from klein_core.variants import TextEncoderConfig, TransformerConfig, VaeConfig
from tests.tiny.transformer import random_span

BF16, GIB = PRECISIONS["bf16"], 1 << 30
NETWORK = TransformerConfig(num_layers=2, num_single_layers=3, num_attention_heads=4, joint_attention_dim=24)
SHAPE = Shape(NETWORK, TextEncoderConfig(qwen3(320, 1216, 4, 1, 64)), VaeConfig())
HALVING = VaeConfig(block_out_channels=(32, 64, 128, 128), decoder_block_out_channels=(32, 64, 128, 128))
NARROW = VaeConfig(block_out_channels=(32, 64, 64, 96), decoder_block_out_channels=(32, 32, 64, 64))


def row_of(name: str) -> PlannedModel:
    row = PUBLISHED_MODELS[name]
    return PlannedModel(
        name,
        row.text_encoder,
        row.transformer,
        row.vae,
        is_distilled=row.is_distilled,
        uses_reference_cache=row.uses_reference_cache,
        published=tuple(row.quantized),
    )


@pytest.mark.parametrize(
    ("name", "network", "text", "quantized"),
    [
        ("klein-4b", 7_751_089_152, 2 * 3_114_088_192, {"nvfp4": 2_460_367_872, "fp8": 4_070_587_392}),
        ("klein-9b", 18_157_162_496, 2 * 5_831_883_520, {"nvfp4": 5_616_193_536, "fp8": 9_433_010_176}),
    ],
)
def test_weights_are_counted_to_the_byte(name, network, text, quantized):
    row = PUBLISHED_MODELS[name]
    assert weight_bytes.transformer_bytes(row.transformer, BF16) == network
    assert weight_bytes.text_encoder_bytes(row.text_encoder, BF16) == text
    # Scales are in a matrix's own count here and not in the published sums.
    for precision, expected in quantized.items():
        found = weight_bytes.transformer_bytes(row.transformer, PRECISIONS[precision])
        assert 0 <= found - expected <= expected * 1e-3


def test_autoencoders_weights_are_counted_to_the_byte():
    statistics = 2 * 128
    assert weight_bytes.vae_bytes(VaeConfig(), 2) == 2 * (84_046_115 + statistics)
    assert weight_bytes.vae_bytes(SMALL_DECODER.vae, 2) == 2 * (62_373_091 + statistics)


@dataclass(frozen=True)
class Arithmetic:
    dtype: torch.dtype
    precision: str
    emulated: bool = False


@pytest.fixture(params=["fp32", "bf16", "bf16 emulated"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Arithmetic:
    """What activations are computed in; either kind of bf16 runs on any processor."""
    if request.param == "fp32":
        return Arithmetic(torch.float32, "fp32")
    emulated = request.param == "bf16 emulated"
    monkeypatch.setattr(linear, "HAS_BFLOAT16_PRODUCTS", not emulated)
    return Arithmetic(torch.bfloat16, "bf16", emulated)


def step_peak(grids: Sequence[Sequence[tuple[int, int]]], dtype: torch.dtype) -> int:
    """Returns what torch allocates for a step of one span for each of `grids`: an image's and its references'."""
    network = FlowTransformer(NETWORK).to(dtype).eval().requires_grad_(False)
    step = [random_span(each, text_length=64, seed=7, in_channels=128, dtype=dtype) for each in grids]
    with torch.no_grad():
        return traced_peak(lambda: network(step))


@pytest.mark.parametrize(
    ("grids", "spans"), [([(16, 12)], 1), ([(8, 8), (8, 12)], 1), ([(10, 8)], 3)], ids=str
)
def test_a_steps_memory_is_what_torch_allocates(arithmetic, grids, spans):
    target, *references = (rows * columns for rows, columns in grids)
    shape = StepShape(spans=spans, text=64, target=target, references=sum(references))
    precision = PRECISIONS[arithmetic.precision]
    expected = step_activations(NETWORK, precision, shape, emulated=arithmetic.emulated).byte_count
    assert expected == pytest.approx(step_peak([grids] * spans, arithmetic.dtype), rel=0.1)


def test_unequal_images_take_what_as_many_tokens_of_equal_ones_take(arithmetic):
    shape = StepShape(spans=3, text=64, target=(16 * 12 + 8 * 8 + 10 * 8) // 3)
    precision = PRECISIONS[arithmetic.precision]
    expected = step_activations(NETWORK, precision, shape, emulated=arithmetic.emulated).byte_count
    found = step_peak([[(16, 12)], [(8, 8)], [(10, 8)]], arithmetic.dtype)
    assert found <= 1.1 * expected, (found, expected)


@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
@pytest.mark.parametrize("config", [NARROW, HALVING], ids=["narrow", "halving"])
def test_the_autoencoders_memory_is_what_torch_allocates(config, tiled, arithmetic):
    config, dtype = replace(config, sample_size=128 if tiled else 1024), arithmetic.dtype
    # As it is loaded: from other layouts convolutions make copies.
    module = Autoencoder(config).eval().requires_grad_(False).to(dtype, memory_format=torch.channels_last)
    size = tile_size_px(config, 256, 192) if tiled else (256, 192)
    latents, image = (
        torch.randn(shape).to(dtype) for shape in ((1, config.packed_channels, 12, 16), (1, 3, 192, 256))
    )
    with torch.no_grad():
        decoding = traced_peak(lambda: module.decode(latents, tiled=tiled))
        encoding = traced_peak(lambda: module.encode(image, tiled=tiled))
    # Finished tiles are kept until the image is assembled, and the given image was allocated before.
    kept = 2 * 3 * 192 * 256 * dtype.itemsize if tiled else 0
    decoded, encoded = (
        count(config, *size, dtype.itemsize, emulated=arithmetic.emulated)
        for count in (decode_bytes, encode_bytes)
    )
    assert decoded + kept == pytest.approx(decoding, rel=0.1)
    assert encoded == pytest.approx(encoding, rel=0.1)


def test_offloading_leaves_two_blocks_on_the_device():
    config = PUBLISHED_MODELS["klein-4b"].transformer
    double, *_, single = weight_bytes.block_bytes(config, BF16)
    outer = weight_bytes.transformer_bytes(config, BF16) - 5 * double - 20 * single
    assert weight_bytes.offloaded_bytes(config, BF16) == outer + 2 * double


@pytest.mark.parametrize(("precision", "gibibytes"), [("bf16", 7.5), ("fp8", 3.75), ("nvfp4", 3.75)])
def test_a_parked_block_takes_a_power_of_two_of_pinned_memory(precision, gibibytes):
    config = PUBLISHED_MODELS["klein-4b"].transformer
    assert weight_bytes.pinned_bytes(config, PRECISIONS[precision]) == gibibytes * GIB
    offloaded = next(way for way in make_plan(row_of("klein-4b"), Workload(), 0).ways if way.is_offloaded)
    assert offloaded.host_bytes == weight_bytes.pinned_bytes(config, BF16)


def test_more_memory_never_gets_a_worse_choice():
    model, chosen = row_of("klein-4b"), []
    for gibibytes in range(1, 33):
        plan = make_plan(model, Workload(), gibibytes * GIB)
        if plan.on_one_device is None:
            assert not chosen
            continue
        assert sum(way.device_bytes for way in plan.on_one_device) <= gibibytes * GIB
        chosen.append(plan.on_one_device)
    assert names_of(chosen[-1]) == ["bf16", "bf16", "bf16"]
    on_cpu = [sum(way.is_on_cpu for way in group) for group in chosen]
    assert on_cpu == sorted(on_cpu, reverse=True)
    assert names_of(chosen[on_cpu.index(0)]) == ["fp8", "fp8, offload", "bf16"]


def names_of(ways: Sequence[StageMemory]) -> list[str]:
    return [way.name for way in ways]


def test_a_small_device_leaves_stages_to_the_cpu():
    plan = make_plan(row_of("klein-4b"), Workload(), 8 * GIB)
    assert names_of(plan.on_one_device) == ["bf16, on the CPU", "fp8", "bf16"]
    text, *_ = plan.on_one_device
    assert (text.device_bytes, text.host_bytes) == (0, text.weight_bytes + text.activation_bytes)
    smaller = make_plan(row_of("klein-4b"), Workload(), 5 * GIB // 2)
    assert [way.is_on_cpu for way in smaller.on_one_device] == [True, False, True]


def test_what_does_not_fit_together_may_fit_apart():
    plan = make_plan(row_of("klein-9b"), Workload(), 7 * GIB)
    assert not plan.is_all_on_device
    assert plan.on_own_devices["text-encoder"].precision == "fp8"
    assert plan.on_own_devices["vae-decoder"].precision == "bf16"
    assert all(way.device_bytes <= 7 * GIB for way in plan.on_own_devices.values() if way)


def denoiser_of(model: PlannedModel, **workload) -> StageMemory:
    plan = make_plan(model, Workload(**workload), GIB)
    return next(way for way in plan.ways if way.stage == "denoiser")


def test_a_larger_workload_takes_more():
    def activations(name: str = "klein-base-4b", **workload) -> int:
        return denoiser_of(row_of(name), **workload).activation_bytes

    one = activations()
    assert activations(references=1) > 1.5 * one
    assert activations(batch=2) == pytest.approx(2 * one, rel=0.05)
    assert activations(sizes_px=((512, 512), (1024, 1024), (64, 64))) == one
    # Guided images are two spans.
    assert one == pytest.approx(2 * activations("klein-4b"), rel=0.05)


def test_a_reference_caches_keys_and_values_are_counted():
    cached, uncached = (
        denoiser_of(row_of(name), references=2).device_bytes for name in ("klein-9b-kv", "klein-9b")
    )
    assert cached - uncached == 2 * 4096 * 524_288


def test_only_images_larger_than_a_tile_gain_from_tiles():
    model = row_of("klein-4b")
    small, large = (
        [need.name for need in make_plan(model, Workload(((side, side),)), GIB).ways if "vae" in need.stage]
        for side in (1024, 1536)
    )
    assert (small, large) == (["bf16"], ["bf16", "bf16, tiled"])


def test_quantizing_at_load_concerns_both_networks():
    model = replace(row_of("klein-4b"), published=())
    found = 0
    for gibibytes in range(4, 16):
        plan = make_plan(model, Workload(), gibibytes * GIB)
        if plan.is_all_on_device:
            words, network, _ = plan.on_one_device
            assert (words.precision == "bf16") is (network.precision == "bf16")
            found += 1
    assert found


def test_each_stage_has_the_cost_of_a_process():
    need = make_plan(row_of("klein-4b"), Workload(), GIB).ways[0]
    assert need.device_bytes == need.weight_bytes + need.activation_bytes + PROCESS_BYTES


def test_a_prompts_memory_is_what_torch_allocates(arithmetic):
    place = Place("cpu", arithmetic.dtype)
    encode = encode_run(cut_text_encoder(SHAPE, place), SHAPE, place)
    precision = PRECISIONS[arithmetic.precision]
    expected = prompt_activations(SHAPE.text_encoder, precision, emulated=arithmetic.emulated).byte_count
    with torch.no_grad():
        found = traced_peak(encode)
    assert expected == pytest.approx(found, rel=0.1)
