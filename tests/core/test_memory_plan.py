"""What a model is said to need: exact for weights, what torch hands out for the rest, and what fits where."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.contenders import Place, cut_text_encoder, encode_run
from benchmarks.peak_memory import traced_peak
from benchmarks.shapes import Shape, qwen3
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.linear import HAS_BFLOAT16_PRODUCTS, needs_fp32_fallback
from klein_core.memory import autoencoder, text_encoder, transformer
from klein_core.memory.plan import PROCESS_BYTES, PlannedModel, Workload, make_plan
from klein_core.memory.precision import PRECISIONS
from klein_core.model_registry import PUBLISHED_MODELS, SMALL_DECODER
from klein_core.vae_decoder.autoencoder import Autoencoder
from klein_core.variants import TextEncoderConfig, TransformerConfig, VaeConfig
from tests.tiny.transformer import random_span

BF16, GIB = PRECISIONS["bf16"], 1 << 30
NETWORK = TransformerConfig(num_layers=2, num_single_layers=3, num_attention_heads=4, joint_attention_dim=24)
SHAPE = Shape(NETWORK, TextEncoderConfig(qwen3(320, 1216, 4, 1, 64)), VaeConfig())
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
    assert transformer.weight_bytes(row.transformer, BF16) == network
    assert text_encoder.weight_bytes(row.text_encoder, BF16) == text
    # Scales are in a matrix's own count here and not in the published sums.
    for precision, expected in quantized.items():
        found = transformer.weight_bytes(row.transformer, PRECISIONS[precision])
        assert 0 <= found - expected <= expected * 1e-3


def test_autoencoders_weights_are_counted_to_the_byte():
    statistics = 2 * 128
    assert autoencoder.weight_bytes(VaeConfig(), 2) == 2 * (84_046_115 + statistics)
    assert autoencoder.weight_bytes(SMALL_DECODER.vae, 2) == 2 * (62_373_091 + statistics)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("grids", "spans"), [([(16, 12)], 1), ([(8, 8), (8, 12)], 1), ([(10, 8)], 3)], ids=str
)
def test_a_steps_memory_is_what_torch_hands_out(dtype, grids, spans):
    network = FlowTransformer(NETWORK).to(dtype).eval().requires_grad_(False)
    step = [
        random_span(grids, text_length=64, seed=seed, in_channels=128, dtype=dtype) for seed in range(spans)
    ]
    target, *references = (rows * columns for rows, columns in grids)
    shape = transformer.StepShape(spans=spans, text=64, target=target, references=sum(references))
    precision = PRECISIONS["fp32" if dtype == torch.float32 else "bf16"]
    expected = transformer.step_bytes(NETWORK, precision, shape, emulated=not HAS_BFLOAT16_PRODUCTS)
    with torch.no_grad():
        found = traced_peak(lambda: network(step))
    assert expected == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unequal_images_take_what_as_many_tokens_of_equal_ones_take(dtype):
    network = FlowTransformer(NETWORK).to(dtype).eval().requires_grad_(False)
    grids = [[(16, 12)], [(8, 8)], [(10, 8)]]
    step = [random_span(each, text_length=64, in_channels=128, dtype=dtype) for each in grids]
    shape = transformer.StepShape(spans=3, text=64, target=(16 * 12 + 8 * 8 + 10 * 8) // 3)
    precision = PRECISIONS["fp32" if dtype == torch.float32 else "bf16"]
    expected = transformer.step_bytes(NETWORK, precision, shape, emulated=not HAS_BFLOAT16_PRODUCTS)
    with torch.no_grad():
        found = traced_peak(lambda: network(step))
    assert found <= 1.1 * expected, (found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
def test_the_autoencoders_memory_is_what_torch_hands_out(tiled, dtype):
    config = replace(NARROW, sample_size=128 if tiled else 1024)
    # As it is loaded: from other layouts convolutions make copies.
    module = Autoencoder(config).eval().requires_grad_(False).to(dtype, memory_format=torch.channels_last)
    size = autoencoder.tiled_size_px(config, 256, 192) if tiled else (256, 192)
    latents, image = (
        torch.randn(shape).to(dtype) for shape in ((1, config.packed_channels, 12, 16), (1, 3, 192, 256))
    )
    with torch.no_grad():
        decoding = traced_peak(lambda: module.decode(latents, tiled=tiled))
        encoding = traced_peak(lambda: module.encode(image, tiled=tiled))
    # Tiles that are done stay until the image is put together, and the image given is not counted as taken.
    kept = 2 * 3 * 192 * 256 * dtype.itemsize if tiled else 0
    decoded, encoded = (
        count(config, *size, dtype.itemsize, emulated=needs_fp32_fallback(torch.device("cpu"), dtype))
        for count in (autoencoder.decode_bytes, autoencoder.encode_bytes)
    )
    assert decoded + kept == pytest.approx(decoding, rel=0.1)
    assert encoded == pytest.approx(encoding, rel=0.1)


def test_offloading_leaves_two_blocks_on_the_device():
    config = PUBLISHED_MODELS["klein-4b"].transformer
    double, *_, single = transformer.block_bytes(config, BF16)
    outer = transformer.weight_bytes(config, BF16) - 5 * double - 20 * single
    assert transformer.offloaded_bytes(config, BF16) == outer + 2 * double


@pytest.mark.parametrize(("precision", "gibibytes"), [("bf16", 7.5), ("fp8", 3.75), ("nvfp4", 3.75)])
def test_a_parked_block_takes_a_power_of_two_of_pinned_memory(precision, gibibytes):
    config = PUBLISHED_MODELS["klein-4b"].transformer
    assert transformer.parked_bytes(config, PRECISIONS[precision]) == gibibytes * GIB
    offloaded = next(need for need in make_plan(row_of("klein-4b"), Workload(), 0).needs if need.is_offloaded)
    assert offloaded.host_bytes == transformer.parked_bytes(config, BF16)


def test_more_memory_never_gets_a_worse_choice():
    model, chosen = row_of("klein-4b"), []
    for gibibytes in range(1, 33):
        plan = make_plan(model, Workload(), gibibytes * GIB)
        if plan.together is None:
            assert not chosen
            continue
        assert sum(need.device_bytes for need in plan.together) <= gibibytes * GIB
        chosen.append([need.name for need in plan.together])
    assert chosen[-1] == ["bf16", "bf16", "bf16"]
    assert chosen[0] == ["fp8", "fp8, offload", "bf16"]


def test_what_does_not_fit_together_may_fit_apart():
    plan = make_plan(row_of("klein-9b"), Workload(), 7 * GIB)
    assert plan.together is None
    assert plan.apart["text-encoder"].precision == "fp8"
    assert plan.apart["vae-decoder"].precision == "bf16"
    assert all(need.device_bytes <= 7 * GIB for need in plan.apart.values() if need)


def test_a_larger_workload_takes_more():
    model = row_of("klein-base-4b")

    def denoiser(**workload) -> int:
        plan = make_plan(model, Workload(**workload), GIB)
        return next(need.activation_bytes for need in plan.needs if need.stage == "denoiser")

    one = denoiser()
    assert denoiser(references=1) > 1.5 * one
    assert denoiser(batch=2) == pytest.approx(2 * one, rel=0.05)
    assert denoiser(sizes_px=((512, 512), (1024, 1024), (64, 64))) == one
    # Guided images are two spans.
    assert one == pytest.approx(2 * _activations(row_of("klein-4b")), rel=0.05)


def _activations(model: PlannedModel) -> int:
    plan = make_plan(model, Workload(), GIB)
    return next(need.activation_bytes for need in plan.needs if need.stage == "denoiser")


def test_a_reference_caches_keys_and_values_are_counted():
    cached = _denoiser_bytes(row_of("klein-9b-kv")) - _denoiser_bytes(row_of("klein-9b"))
    assert cached == 2 * 4096 * 524_288


def _denoiser_bytes(model: PlannedModel) -> int:
    plan = make_plan(model, Workload(references=2), GIB)
    need = next(need for need in plan.needs if need.stage == "denoiser")
    return need.device_bytes


def test_only_images_larger_than_a_tile_gain_from_tiles():
    model = row_of("klein-4b")
    small, large = (
        [need.name for need in make_plan(model, Workload(((side, side),)), GIB).needs if "vae" in need.stage]
        for side in (1024, 1536)
    )
    assert (small, large) == (["bf16"], ["bf16", "bf16, tiled"])


def test_quantizing_at_load_concerns_both_networks():
    model = replace(row_of("klein-4b"), published=())
    for need in range(4, 16):
        together = make_plan(model, Workload(), need * GIB).together
        if together is not None:
            words, network, _ = together
            assert (words.precision == "bf16") is (network.precision == "bf16")


def test_a_process_of_its_own_costs_each_stage():
    need = make_plan(row_of("klein-4b"), Workload(), GIB).needs[0]
    assert need.device_bytes == need.weight_bytes + need.activation_bytes + PROCESS_BYTES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prompts_memory_is_what_torch_hands_out(dtype):
    place = Place("cpu", dtype)
    encode = encode_run(cut_text_encoder(SHAPE, place), SHAPE, place)
    precision = PRECISIONS["fp32" if dtype == torch.float32 else "bf16"]
    expected = text_encoder.encode_bytes(SHAPE.text_encoder, precision, emulated=not HAS_BFLOAT16_PRODUCTS)
    with torch.no_grad():
        found = traced_peak(encode)
    assert expected == pytest.approx(found, rel=0.1)
