"""Quality and size of quantized models: images of the embedded model, bytes of the published models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from klein_core.denoiser.transformer import FlowTransformer, is_block_linear
from klein_core.pico import WEIGHTS
from klein_core.pipeline import Pipeline
from klein_core.quantization import quantized_weight
from klein_core.quantization.constants import BLOCK, swizzled_shape
from klein_core.quantization.fp8 import Float8Weight, Int8Weight
from klein_core.quantization.nvfp4 import Float4Weight
from klein_core.quantization.quantized_weight import QuantizedWeight, set_weight
from klein_core.variants import TransformerConfig
from tests.tiny.layouts import bfl_transformer
from tests.tiny.quantized import comfy_header, is_block_matrix, quantized_file, write_float8, write_nvfp4
from tests.tiny.transformer import random_span

PROMPT = "a large red heart on a yellow background"
LEAST_PSNR_DB = {"fp8": 42.0, "int8": 45.0, "nvfp4": 36.0}
"""Of an image against bfloat16's; measured over three prompts: 42.9 to 51.7, 50.9 to 54.2, 40.5 to 46.4 at 128²,
and more at 64². Above 40 dB images cannot be told apart by eye."""
DTYPE = torch.bfloat16


@pytest.fixture(scope="module")
def pico() -> Pipeline:
    return Pipeline.from_folder(WEIGHTS, dtype=DTYPE)


@pytest.fixture(scope="module")
def image(pico: Pipeline) -> Tensor:
    return paint(pico)


def paint(pipeline: Pipeline) -> Tensor:
    return next(pipeline.generate(PROMPT, width_px=64, height_px=64, seeds=[0]))


def with_transformer(pico: Pipeline, transformer: FlowTransformer) -> Pipeline:
    return Pipeline(pico.text_encoder, transformer, pico.vae_decoder, pico.is_distilled)


def psnr_db(one: Tensor, other: Tensor) -> float:
    error = (one.float() - other.float()).square().mean()
    assert error > 0, "nothing was quantized"
    return float(10 * torch.log10(255**2 / error))


def byte_count(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def pico_file(folder: Path, write: Callable[[Tensor], object], form: str) -> Path:
    """Writes the embedded model's transformer as the authors write a quantized one."""
    (folder / "transformer").mkdir()
    shutil.copy(WEIGHTS / "transformer" / "config.json", folder / "transformer")
    tensors = bfl_transformer(load_file(next((WEIGHTS / "transformer").glob("*.safetensors"))))
    file = quantized_file(tensors, write, is_block_matrix)
    save_file(
        {name: tensor.contiguous() for name, tensor in file.tensors.items()},
        folder / "transformer" / "model.safetensors",
        comfy_header(file.layers, form),
    )
    return folder


def test_an_image_from_an_fp8_file(tmp_path: Path, pico: Pipeline, image: Tensor):
    folder = pico_file(tmp_path, lambda weight: write_float8(weight, input_scale=None), "float8_e4m3fn")
    pipeline = with_transformer(pico, FlowTransformer.from_folder(folder, dtype=DTYPE))
    assert psnr_db(paint(pipeline), image) > LEAST_PSNR_DB["fp8"]
    assert byte_count(pipeline.transformer) <= 0.62 * byte_count(pico.transformer)


def test_an_image_from_an_nvfp4_file(tmp_path: Path, pico: Pipeline, image: Tensor):
    folder = pico_file(tmp_path, write_nvfp4, "nvfp4")
    pipeline = with_transformer(pico, FlowTransformer.from_folder(folder, dtype=DTYPE))
    assert psnr_db(paint(pipeline), image) > LEAST_PSNR_DB["nvfp4"]
    assert byte_count(pipeline.transformer) <= 0.45 * byte_count(pico.transformer)


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_an_image_after_quantizing_both_stages_at_load(name: str, image: Tensor):
    pipeline = Pipeline.from_folder(WEIGHTS, dtype=DTYPE, quantization=name)
    assert psnr_db(paint(pipeline), image) > LEAST_PSNR_DB[name]
    for module, count in ((pipeline.transformer, 2 * 8 + 4 * 2), (pipeline.text_encoder.model, 4 * 7)):
        assert sum(isinstance(part, QuantizedWeight) for part in module.modules()) == count
    assert {value.dtype for value in pipeline.vae_decoder.autoencoder.parameters()} == {DTYPE}


def test_an_image_with_inputs_in_eight_bits_too(
    pico: Pipeline, image: Tensor, monkeypatch: pytest.MonkeyPatch
):
    """As a Hopper device computes it; torch's CPU product of 8-bit floats stands in for it."""
    monkeypatch.setattr(quantized_weight, "capability_of", lambda device: (9, 0))
    transformer = FlowTransformer.from_folder(WEIGHTS, dtype=DTYPE, quantization="fp8")
    assert psnr_db(paint(with_transformer(pico, transformer)), image) > LEAST_PSNR_DB["fp8"]


def test_compiled_blocks_give_the_same_bits():
    plain, compiled = (FlowTransformer.from_folder(WEIGHTS, quantization="fp8") for _ in range(2))
    compiled.compile_blocks(backend="eager")
    span = random_span([(2, 2)], joint_attention_dim=384, in_channels=128)
    with torch.inference_mode():
        assert torch.equal(compiled([span])[0], plain([span])[0])


def test_which_layers_are_quantized_at_load(pico: Pipeline):
    quantized = FlowTransformer.from_folder(WEIGHTS, quantization="fp8")
    stored = {name for name, part in quantized.named_modules() if isinstance(part, QuantizedWeight)}
    assert stored == {name for name in pico.transformer.state_dict() if is_block_linear(name)}
    plain = {name for name, _ in quantized.named_parameters()}
    outside = {
        name for name in plain if not name.startswith(("transformer_blocks", "single_transformer_blocks"))
    }
    # As the published files: embedders, modulations, head; and in the blocks the norms.
    assert len(outside) == 9
    assert all(".norm_" in name for name in plain - outside)


def test_what_is_quantized_stays_as_it_is(tmp_path: Path):
    """One setting serves a suite of which one part's file is quantized and the other's is plain."""
    folder = pico_file(tmp_path, write_float8, "float8_e4m3fn")
    as_stored, told_otherwise = (
        FlowTransformer.from_folder(folder, quantization=kind).state_dict() for kind in ("none", "int8")
    )
    assert as_stored.keys() == told_otherwise.keys()
    assert all(torch.equal(as_stored[name], told_otherwise[name]) for name in as_stored)


def stored_on_meta(kind: str, rows: int, columns: int) -> QuantizedWeight:
    def bytes_of(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.uint8, device="meta")

    scalar = torch.empty(1, device="meta")
    if kind == "fp8":
        return Float8Weight(bytes_of(rows, columns), scalar, scalar)
    if kind == "int8":
        return Int8Weight(bytes_of(rows, columns), torch.empty(rows, device="meta"))
    tiles = bytes_of(*swizzled_shape(rows, columns // BLOCK))
    return Float4Weight(bytes_of(rows, columns // 2), tiles, scalar, scalar)


@pytest.mark.parametrize(
    ("kind", "published_bytes", "share"),
    [
        ("bf16", 7_751_089_152, 1),
        ("fp8", 4_070_624_520, 0.62),
        ("nvfp4", 2_460_367_872, 0.45),
        ("int8", None, 0.62),
    ],
)
def test_memory_of_the_4b_denoiser(kind: str, published_bytes: int | None, share: float):
    """Against the published files' sizes, which hold little else; the claims are 40 % and 55 % less."""
    with torch.device("meta"):
        transformer = FlowTransformer(four_billion()).to(torch.bfloat16)
    plain = byte_count(transformer)
    if kind != "bf16":
        for name, parameter in list(transformer.named_parameters()):
            if is_block_linear(name):
                set_weight(transformer, name, stored_on_meta(kind, *parameter.shape))
    assert byte_count(transformer) <= share * plain
    if published_bytes is not None:
        assert byte_count(transformer) == pytest.approx(published_bytes, rel=1e-4)


def four_billion() -> TransformerConfig:
    return TransformerConfig(num_layers=5, num_single_layers=20, num_attention_heads=24)
