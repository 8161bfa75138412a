"""Reports on files from their headers: full-size files without their gigabytes, and broken ones."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from klein_core.checkpoint.inspect import inspect_path
from klein_core.checkpoint.tensor_reader import TensorReader
from klein_core.errors import CheckpointError
from klein_core.model_registry import PUBLISHED_MODELS, SMALL_DECODER
from klein_core.pico import WEIGHTS
from tests.core.hollow import hollow_file, meta_tensors, write_hollow
from tests.tiny.layouts import bfl_transformer, prefixed


def only(report):
    [component] = report.components
    return component


def shares(component):
    return {
        (share.group, share.precision): (share.tensor_count, share.byte_count) for share in component.shares
    }


def test_the_embedded_model_is_whole_and_nothing_of_it_is_read(monkeypatch):
    monkeypatch.setattr(TensorReader, "_fill", lambda *_: pytest.fail("weights were read"))
    report = inspect_path(WEIGHTS)
    assert report.is_usable
    assert [component.component for component in report.components] == ["transformer", "text_encoder", "vae"]
    files = {path.parent.name: load_file(path) for path in WEIGHTS.rglob("*.safetensors")}
    for component in report.components:
        stored = files[component.component]
        assert component.tensor_count == len(stored) == sum(share.tensor_count for share in component.shares)
        assert component.byte_count == sum(tensor.nbytes for tensor in stored.values())
        assert component.byte_count == sum(share.byte_count for share in component.shares)


def test_a_full_size_transformer_tells_what_it_can_be(tmp_path):
    file = hollow_file(tmp_path, "transformer", PUBLISHED_MODELS["klein-9b"].transformer, "bfl")
    report = inspect_path(file)
    component = only(report)
    assert report.is_usable
    assert component.style == "bfl"
    assert component.variants == ("klein-9b", "klein-base-9b", "klein-9b-kv")
    assert component.tensor_count == 201
    assert component.byte_count == 18_157_162_496
    assert {share.precision for share in component.shares} == {"bf16"}
    assert "8 double and 24 single blocks" in component.shape


def test_the_official_fp8_file_tells_its_precision_by_group(tmp_path):
    """Sizes are the published file's: model facts 7.1."""
    tensors = bfl_transformer(meta_tensors(PUBLISHED_MODELS["klein-4b"].transformer))
    layers = [
        name.removesuffix(".weight") for name in tensors
        if name.endswith((".qkv.weight", "_attn.proj.weight", "_mlp.0.weight", "_mlp.2.weight"))
        or (name.startswith("single_blocks.") and name.endswith((".linear1.weight", ".linear2.weight")))
    ]  # fmt: skip
    assert len(layers) == 80
    scales = {
        f"{layer}.{kind}": torch.empty(()) for layer in layers for kind in ("weight_scale", "input_scale")
    }
    dtypes = {f"{layer}.weight": "F8_E4M3" for layer in layers} | dict.fromkeys(scales, "F32")
    noted = {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}}
    metadata = {"_quantization_metadata": json.dumps(noted)}
    file = write_hollow(tmp_path / "any.safetensors", tensors | scales, dtypes, metadata)
    report = inspect_path(file)
    component, found = only(report), shares(only(report))
    assert report.is_usable
    assert component.tensor_count == 309
    assert component.variants == ("klein-4b", "klein-base-4b")
    assert component.byte_count == 4_070_587_392 + 80 * 8
    fp8_bytes = found["double-stream blocks", "fp8"][1] + found["single-stream blocks", "fp8"][1]
    assert fp8_bytes == 3_680_501_760 + 80 * 8
    assert found["double-stream blocks", "bf16"][0] == 5 * 4
    assert {group for group, precision in found if precision == "bf16"} >= {"embedders", "modulation", "head"}
    # Without a scale, it says which.
    less = {name: tensor for name, tensor in scales.items() if name != f"{layers[0]}.weight_scale"}
    broken = only(inspect_path(write_hollow(tmp_path / "less.safetensors", tensors | less, dtypes, metadata)))
    assert not broken.is_usable
    assert layers[0] in broken.problems[0]


def test_what_stages_never_read_is_counted_apart(tmp_path):
    row = PUBLISHED_MODELS["klein-4b"]
    component = only(inspect_path(hollow_file(tmp_path, "text_encoder", row.text_encoder, "transformers")))
    assert component.variants == ("klein-4b", "klein-base-4b")
    found = shares(component)
    needed = found["layers", "bf16"][1] + found["embedding table", "bf16"][1]
    assert needed == 2 * 3_114_088_192
    assert found["not needed", "bf16"][0] == 9 * 11 + 2


def test_the_small_decoder_is_called_that(tmp_path):
    component = only(inspect_path(hollow_file(tmp_path, "vae", SMALL_DECODER.vae, "bfl")))
    assert component.variants == ("small-decoder",)
    assert component.is_usable


def test_a_file_with_several_parts_reports_each(tmp_path):
    pico = {path.parent.name: load_file(path) for path in WEIGHTS.rglob("*.safetensors")}
    whole = prefixed(pico["transformer"], "model.diffusion_model.") | prefixed(
        pico["vae"], "first_stage_model."
    )
    save_file(whole, tmp_path / "whole.safetensors")
    report = inspect_path(tmp_path / "whole.safetensors")
    assert {component.component: component.prefix for component in report.components} == {
        "transformer": "model.diffusion_model.",
        "vae": "first_stage_model.",
    }


def test_missing_and_extra_tensors_are_named(tmp_path):
    tensors = load_file(WEIGHTS / "transformer" / "diffusion_pytorch_model.safetensors")
    del tensors["context_embedder.weight"], tensors["transformer_blocks.1.attn.to_k.weight"]
    save_file(tensors | {"extra.weight": torch.ones(1)}, tmp_path / "t.safetensors")
    component = only(inspect_path(tmp_path / "t.safetensors"))
    assert not component.is_usable
    assert "context_embedder.weight" in component.problems[0]
    (tmp_path / "config.json").write_bytes((WEIGHTS / "transformer" / "config.json").read_bytes())
    component = only(inspect_path(tmp_path))
    assert component.extra == ("extra.weight",)
    assert component.missing[0] == "context_embedder.weight"
    assert "transformer_blocks.1.attn.to_qkv.weight (has" in component.missing[1]


def test_a_folder_with_a_broken_part_reports_the_others(tmp_path):
    for part in WEIGHTS.rglob("*"):
        if part.is_file():
            (tmp_path / part.relative_to(WEIGHTS)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / part.relative_to(WEIGHTS)).write_bytes(part.read_bytes())
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x80\x04")
    report = inspect_path(tmp_path)
    assert [component.component for component in report.components] == ["transformer", "text_encoder"]
    assert not report.is_usable
    assert "pickle" in report.problems[0]


def test_what_is_no_part_of_a_model_is_called_what_it_is(tmp_path):
    save_file({"x.lora_A.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="it holds an adapter"):
        inspect_path(tmp_path / "a.safetensors")
    save_file({"weight": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="it holds weight"):
        inspect_path(tmp_path / "b.safetensors")


def test_it_needs_no_torch():
    script = "import sys, klein_services.cli.inspect; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
