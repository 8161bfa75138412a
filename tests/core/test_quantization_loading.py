"""Files of every quantized layout are read exactly, and ambiguous ones are rejected by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from klein_core.denoiser.transformer import FlowTransformer
from klein_core.errors import CheckpointError
from klein_core.quantization.constants import QUANTIZATIONS
from klein_core.quantization.fp8 import Float8Weight, Int8Weight
from klein_core.quantization.nvfp4 import Float4Weight
from klein_core.quantization.quantized_weight import QuantizedWeight
from klein_core.text_encoder.encoder import TextEncoder
from tests.tiny.layouts import bfl_transformer, prefixed
from tests.tiny.quantized import (
    QuantizedFile,
    comfy_header,
    comfy_markers,
    is_block_matrix,
    quantized_file,
    write_float8,
    write_int8,
    write_modelopt_nvfp4,
    write_nvfp4,
    write_smoothed_nvfp4,
)
from tests.tiny.text_encoder import save_tiny_text_encoder
from tests.tiny.transformer import random_span, tiny_oracle

Tensors = dict[str, Tensor]
BLOCK_LAYERS = 2 * 8 + 3 * 2
"""Matrices of two double and three single blocks, fused as the authors have them."""
QKV = "double_blocks.0.img_attn.qkv"


@pytest.fixture(scope="module")
def plain() -> Tensors:
    return dict(tiny_oracle().state_dict())


@pytest.fixture(scope="module")
def official(plain: Tensors) -> Tensors:
    return bfl_transformer(plain)


def save(folder: Path, tensors: Tensors, metadata: dict[str, str] | None = None, **config: object) -> Path:
    """Writes `folder/transformer`."""
    oracle = tiny_oracle()
    oracle.save_config(folder / "transformer")
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "transformer" / "diffusion_pytorch_model.safetensors", metadata)
    return folder


def stored_weights(module: nn.Module) -> dict[str, QuantizedWeight]:
    return {name: part for name, part in module.named_modules() if isinstance(part, QuantizedWeight)}


def assert_reads_exactly(folder: Path, file: QuantizedFile, tmp_path: Path, count: int) -> FlowTransformer:
    """The same network as from the values in full, weight by weight and in what it computes."""
    ours = FlowTransformer.from_folder(folder)
    exact = FlowTransformer.from_folder(save(tmp_path / "exact", file.values))
    stored = stored_weights(ours)
    assert len(stored) == count
    for name, weight in stored.items():
        assert torch.equal(weight.dense(torch.float32), exact.get_parameter(name)), name
    span = random_span([(4, 6), (3, 3)])
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            ours.to(dtype)
            exact.to(dtype)
            for part in stored.values():
                part.dtype = dtype
            assert torch.equal(ours([span])[0], exact([span])[0])
    return ours


def test_official_fp8(tmp_path: Path, official: Tensors):
    file = quantized_file(official, write_float8, is_block_matrix)
    save(tmp_path, file.tensors, comfy_header(file.layers, "float8_e4m3fn"))
    ours = assert_reads_exactly(tmp_path, file, tmp_path, BLOCK_LAYERS)
    qkv = ours.get_submodule("transformer_blocks.0.attn.to_qkv.weight")
    assert isinstance(qkv, Float8Weight)
    assert qkv.scale.shape == qkv.input_scale.shape == (1,)


def test_official_nvfp4(tmp_path: Path, official: Tensors):
    # The 9B file keeps some matrices of its blocks; dtypes decide, not a list.
    kept = {"single_blocks.1.linear2.weight", "double_blocks.1.txt_mlp.0.weight"}
    file = quantized_file(official, write_nvfp4, lambda name: is_block_matrix(name) and name not in kept)
    save(tmp_path, file.tensors, comfy_header(file.layers, "nvfp4"))
    ours = assert_reads_exactly(tmp_path, file, tmp_path, BLOCK_LAYERS - 2)
    assert all(type(weight) is Float4Weight for weight in stored_weights(ours).values())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("is_listed_with_prefix", [True, False])
def test_comfy_files_with_prefixes(
    tmp_path: Path, official: Tensors, prefix: str, is_listed_with_prefix: bool
):
    file = quantized_file(official, write_nvfp4, is_block_matrix)
    layers = [prefix + layer for layer in file.layers] if is_listed_with_prefix else file.layers
    save(tmp_path, prefixed(file.tensors, prefix), comfy_header(layers, "nvfp4"))
    assert_reads_exactly(tmp_path, file, tmp_path, BLOCK_LAYERS)


@pytest.mark.parametrize("form", ["float8_e4m3fn", "nvfp4", "int8_tensorwise"])
def test_comfy_files_with_markers(tmp_path: Path, official: Tensors, form: str):
    write = {"float8_e4m3fn": partial(write_float8, input_scale=None), "nvfp4": write_nvfp4}.get(
        form, write_int8
    )
    # As dev's fp8mixed, which leaves qkv alone.
    file = quantized_file(official, write, lambda name: is_block_matrix(name) and "qkv" not in name)
    markers = comfy_markers(file.layers, form, full_precision_matrix_mult=True)
    save(tmp_path, prefixed(file.tensors | markers, "diffusion_model."))
    ours = assert_reads_exactly(tmp_path, file, tmp_path, BLOCK_LAYERS - 4)
    assert all(
        weight.full_precision for weight in stored_weights(ours).values() if type(weight) is not Int8Weight
    )
    assert all(weight.input_scale is None for weight in stored_weights(ours).values()) is (form != "nvfp4")


@pytest.mark.parametrize("told_by", ["config", "hf_quant_config", "header"])
def test_modelopt_nvfp4_of_three_projections_that_become_one(tmp_path: Path, plain: Tensors, told_by: str):
    file = quantized_file(plain, write_modelopt_nvfp4, is_block_matrix)
    settings = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["proj_out"]}
    config = {"quantization_config": settings} if told_by == "config" else {}
    save(tmp_path, file.tensors, {"quantization": "nvfp4"} if told_by == "header" else None, **config)
    if told_by == "hf_quant_config":
        path = tmp_path / "transformer" / "hf_quant_config.json"
        path.write_text(
            json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}})
        )
    ours = assert_reads_exactly(tmp_path, file, tmp_path, BLOCK_LAYERS)
    qkv = ours.get_submodule("transformer_blocks.0.attn.to_qkv.weight")
    # Three matrices were quantized, each to a scale of its own.
    assert isinstance(qkv, QuantizedWeight)
    assert len(qkv.scale.unique()) == 3


@pytest.mark.parametrize("per_row", [False, True], ids=["ModelOpt", "fp8r"])
def test_fp8_in_diffusers_names(tmp_path: Path, plain: Tensors, per_row: bool):
    file = quantized_file(plain, partial(write_float8, per_row=per_row), is_block_matrix)
    if per_row:
        save(tmp_path, file.tensors, {"quantization": "fp8r"})
    else:
        save(tmp_path, file.tensors, quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"})
    assert_reads_exactly(tmp_path, file, tmp_path, BLOCK_LAYERS)


def test_smoothed_nvfp4(tmp_path: Path, official: Tensors):
    file = quantized_file(official, write_smoothed_nvfp4, is_block_matrix)
    save(tmp_path, file.tensors | comfy_markers(file.layers, "nvfp4"))
    assert_reads_exactly(tmp_path, file, tmp_path, BLOCK_LAYERS)
    wrong = file.tensors | {f"{QKV}.pre_quant_scale": torch.ones(96)} | comfy_markers(file.layers, "nvfp4")
    with pytest.raises(CheckpointError, match=rf"dtype or shape \({QKV}.pre_quant_scale\)"):
        FlowTransformer.from_folder(save(tmp_path, wrong))


def test_every_matrix_may_be_quantized_even_the_head(tmp_path: Path, official: Tensors):
    file = quantized_file(official, write_float8, lambda name: name.endswith(".weight"))
    save(tmp_path, file.tensors, comfy_header(file.layers, "float8_e4m3fn"))
    ours = FlowTransformer.from_folder(tmp_path)
    assert ours.dtype == torch.float32
    # The final layer's halves have changed places; they still have one scale.
    head = ours.get_submodule("norm_out.linear.weight")
    assert isinstance(head, Float8Weight)
    assert head.scale.shape == (1,)
    assert_reads_exactly(tmp_path, file, tmp_path, BLOCK_LAYERS + 9)


def test_three_projections_stored_in_two_ways_are_dequantized(tmp_path: Path, plain: Tensors):
    odd = "transformer_blocks.0.attn.to_k.weight"
    file = quantized_file(plain, write_float8, lambda name: is_block_matrix(name) and name != odd)
    save(tmp_path, file.tensors, {"quantization": "fp8r"})
    ours = assert_reads_exactly(tmp_path, file, tmp_path, BLOCK_LAYERS - 1)
    exact = torch.cat([file.values[f"transformer_blocks.0.attn.to_{part}.weight"] for part in "qkv"])
    assert torch.equal(
        ours.get_parameter("transformer_blocks.0.attn.to_qkv.weight").float(), exact.bfloat16().float()
    )


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {other: tensor for other, tensor in tensors.items() if other != name}


def having(name: str, tensor: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: tensor}


REFUSED_FP8: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no scale": (without(f"{QKV}.weight_scale"), f"without .weight_scale: {QKV}.weight"),
    "scale shape": (having(f"{QKV}.weight_scale", torch.ones(3)), rf"dtype or shape \({QKV}.weight_scale\)"),
    "scale dtype": (
        having(f"{QKV}.weight_scale", torch.ones(96, 2, dtype=torch.uint8)),
        rf"dtype or shape \({QKV}.weight_scale\)",
    ),
    "input scale": (having(f"{QKV}.input_scale", torch.ones(32)), rf"dtype or shape \({QKV}.input_scale\)"),
    "NaN": (having(f"{QKV}.weight_scale", torch.tensor(float("nan"))), f"not finite: {QKV}.weight_scale"),
    "NaN weight": (
        having(f"{QKV}.weight", torch.full((96, 32), float("nan")).to(torch.float8_e4m3fn)),
        f"not finite: {QKV}.weight",
    ),
    "second scale": (having(f"{QKV}.weight_scale_2", torch.ones(())), f"with .weight_scale_2: {QKV}.weight"),
    "smoothing": (having(f"{QKV}.pre_quant_scale", torch.ones(32)), f"with .pre_quant_scale: {QKV}.weight"),
    "orphan": (having("img_out.weight_scale", torch.ones(())), "describe no tensor: img_out.weight_scale"),
    "plain": (having("img_in.weight_scale", torch.ones(())), "plain numbers with .*: img_in.weight"),
    "extra": (having("img_in.zero_point", torch.ones(())), "not part of this model: img_in.zero_point"),
    "shape": (having(f"{QKV}.weight", torch.ones(90, 32).to(torch.float8_e4m3fn)), r"\(90, 32\) instead of"),
    "axes": (having(f"{QKV}.weight", torch.ones(96).to(torch.float8_e4m3fn)), "shape that fp8 cannot have"),
}


@pytest.mark.parametrize("case", REFUSED_FP8)
def test_an_incomplete_or_contradictory_fp8_file_is_refused(tmp_path: Path, official: Tensors, case: str):
    change, message = REFUSED_FP8[case]
    file = quantized_file(official, write_float8, is_block_matrix)
    save(tmp_path, change(file.tensors), comfy_header(file.layers, "float8_e4m3fn"))
    with pytest.raises(CheckpointError, match=message):
        FlowTransformer.from_folder(tmp_path)


REFUSED_METADATA: dict[str, tuple[dict[str, str], str]] = {
    "none": ({}, rf"the checkpoint's metadata does not name: .*{QKV}.weight"),
    "other layout": ({"quantization": "nvfp4"}, rf"dtype or shape \({QKV}.weight_scale\).*: {QKV}.weight"),
    "other form": (comfy_header([QKV], "float8_e4m3fn"), "with .weight_scale_2"),
    "unknown form": (comfy_header([QKV], "mxfp8"), f"{QKV} is stored as mxfp8; supported are float8_e4m3fn"),
    "SVDQuant": (comfy_header([QKV], "svdquant_w4a4"), "stored as svdquant_w4a4"),
    "rotated": (comfy_header([QKV], "nvfp4", convrot=True), "convrot.*not supported"),
    "no format": ({"_quantization_metadata": json.dumps({"layers": {QKV: {}}})}, "must have a format"),
    "version": ({"_quantization_metadata": json.dumps({"format_version": "2.0", "layers": {}})}, "'2.0'"),
    "not JSON": ({"_quantization_metadata": "{"}, "is not JSON"),
    "list": ({"_quantization_metadata": "[]"}, "must be a JSON object"),
    "some": (
        comfy_header([QKV], "nvfp4"),
        "not listed in the checkpoint's metadata: double_blocks.0.img_attn.proj",
    ),
    "another tool": ({"quantization": "gptq"}, "names 'gptq'; supported are FP8, NVFP4"),
    "twice": (
        comfy_header([QKV], "nvfp4") | {"quantization": "nvfp4"},
        "listed as nvfp4 and as nvfp4 .ModelOpt.",
    ),
    "absent": (
        comfy_header(["double_blocks.9.img_attn.qkv"], "nvfp4"),
        "absent: double_blocks.9.img_attn.qkv",
    ),
}


@pytest.mark.parametrize("case", REFUSED_METADATA)
def test_a_four_bit_file_with_ambiguous_metadata_is_refused(tmp_path: Path, official: Tensors, case: str):
    metadata, message = REFUSED_METADATA[case]
    file = quantized_file(official, write_nvfp4, is_block_matrix)
    save(tmp_path, file.tensors, metadata)
    with pytest.raises(CheckpointError, match=message):
        FlowTransformer.from_folder(tmp_path)


def test_a_marker_that_contradicts_the_header_is_refused(tmp_path: Path, official: Tensors):
    file = quantized_file(official, write_float8, is_block_matrix)
    markers = comfy_markers([QKV], "float8_e4m3fn", full_precision_matrix_mult=True)
    save(tmp_path, file.tensors | markers, comfy_header(file.layers, "float8_e4m3fn"))
    with pytest.raises(CheckpointError, match=f"{QKV}.comfy_quant contradicts the header"):
        FlowTransformer.from_folder(tmp_path)
    save(tmp_path, file.tensors | {f"{QKV}.comfy_quant": torch.zeros(5000, dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match=f"not at most 4096 bytes of text: {QKV}.comfy_quant"):
        FlowTransformer.from_folder(tmp_path)
    save(tmp_path, file.tensors | {f"{QKV}.comfy_quant": torch.full((4,), 255, dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match=f"{QKV}.comfy_quant is not text"):
        FlowTransformer.from_folder(tmp_path)


def test_a_modelopt_file_that_says_two_things_is_refused(tmp_path: Path, plain: Tensors):
    file = quantized_file(plain, write_modelopt_nvfp4, is_block_matrix)
    settings = {"quant_method": "modelopt", "quant_algo": "FP8"}
    save(tmp_path, file.tensors, {"quantization": "nvfp4"}, quantization_config=settings)
    with pytest.raises(
        CheckpointError, match=r"contradicts itself: the header names .*, config.json names fp8"
    ):
        FlowTransformer.from_folder(tmp_path)
    save(tmp_path, file.tensors, quantization_config=settings | {"quant_algo": "W4A16_AWQ"})
    with pytest.raises(CheckpointError, match=r"config\.json names 'W4A16_AWQ'"):
        FlowTransformer.from_folder(tmp_path)
    save(tmp_path, file.tensors, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(CheckpointError, match="'bitsandbytes'; supported is 'modelopt'"):
        FlowTransformer.from_folder(tmp_path)
    save(tmp_path, file.tensors, quantization_config=settings)
    with pytest.raises(CheckpointError, match=r"U8, but listed as fp8|with \.weight_scale_2"):
        FlowTransformer.from_folder(tmp_path)


@pytest.mark.parametrize("form", ["float8_e4m3fn", "nvfp4"])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_text_encoders_as_comfy_has_them(tmp_path: Path, form: str, prefix: str):
    oracle = save_tiny_text_encoder(tmp_path)
    tensors = {name.removeprefix("model."): tensor for name, tensor in oracle.state_dict().items()}
    del tensors["lm_head.weight"]
    write = write_float8 if form == "float8_e4m3fn" else write_nvfp4
    # "Mixed": some projections keep their numbers, and the table of embeddings may be quantized too.
    kept = "layers.1.mlp.gate_proj.weight"
    chosen = {name for name in tensors if "_proj" in name and name != kept} | {"embed_tokens.weight"}
    file = quantized_file(tensors, write, lambda name: name in chosen)
    markers = comfy_markers(file.layers, form)
    path = tmp_path / "text_encoder" / "model.safetensors"
    save_file(prefixed(file.tensors | markers, prefix), path)
    ours = TextEncoder.from_folder(tmp_path)
    # Layers 3 and later are not read, of which this model has one.
    assert len(stored_weights(ours.model)) == 3 * 7 - 1 + 1
    save_file({name: tensor.contiguous() for name, tensor in file.values.items()}, path)
    exact = TextEncoder.from_folder(tmp_path)
    for one, other in zip(ours.encode(["the cat", "an"]), exact.encode(["the cat", "an"]), strict=True):
        assert torch.equal(one.embedding, other.embedding)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint16, torch.bool, torch.float64], ids=str)
def test_plain_tensors_of_unsupported_types_are_not_quantized_either(
    plain: Tensors, tmp_path: Path, quantization: str, dtype: torch.dtype
):
    name = "single_transformer_blocks.0.attn.to_out.weight"
    folder = save(tmp_path, plain | {name: plain[name].to(dtype)})
    with pytest.raises(CheckpointError, match=re.escape(name)):
        FlowTransformer.from_folder(folder, quantization=quantization)
