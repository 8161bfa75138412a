"""Components from separate files and folders, and configurations inferred from shapes alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from klein_core.checkpoint import infer_config
from klein_core.checkpoint.config import (
    read_sampling,
    read_text_encoder_config,
    read_transformer_config,
    read_vae_config,
    read_variant,
)
from klein_core.checkpoint.files import ModelFiles, open_checkpoint
from klein_core.errors import CheckpointError
from klein_core.model_registry import PUBLISHED_MODELS, SMALL_DECODER
from klein_core.pipeline import Pipeline
from klein_core.variants import TransformerConfig
from tests.core.hollow import hollow_file
from tests.tiny.checkpoint import save_tiny_checkpoint
from tests.tiny.layouts import bare_text_encoder, bfl_transformer, bfl_vae, prefixed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose prompts have klein's length, which no tensor determines."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save_tiny_checkpoint(folder, text_encoder={"max_sequence_length": 512})
    return folder


@pytest.fixture(scope="module")
def bare(folder, tmp_path_factory):
    """The same model as three bare files in other layouts, and a tokenizer."""
    files = tmp_path_factory.mktemp("bare")
    weights = "diffusion_pytorch_model.safetensors"
    save_file(
        prefixed(bfl_transformer(load_file(folder / "transformer" / weights)), "model.diffusion_model."),
        files / "t.safetensors",
    )
    save_file(bfl_vae(load_file(folder / "vae" / weights)), files / "v.safetensors")
    language = load_file(folder / "text_encoder" / "model.safetensors")
    save_file(bare_text_encoder(language, lm_head=False), files / "q.safetensors")
    return ModelFiles(
        transformer=files / "t.safetensors",
        vae=files / "v.safetensors",
        text_encoder=files / "q.safetensors",
        tokenizer=folder / "tokenizer",
        variant="klein-4b",
    )


def test_three_bare_files_make_the_folder_s_picture(folder, bare):
    arguments = {"width_px": 64, "height_px": 64, "seeds": [3], "step_count": 2}
    [expected] = Pipeline.from_folder(folder).generate("a cat", **arguments)
    [made] = Pipeline.from_folder(bare).generate("a cat", **arguments)
    assert torch.equal(made, expected)


def test_shapes_tell_what_the_folder_s_configurations_say(folder, bare):
    inferred, written = read_variant(bare), read_variant(folder)
    assert inferred.transformer == written.transformer
    assert inferred.vae == replace(written.vae, sample_size=inferred.vae.sample_size)
    assert inferred.text_encoder.tapped_layers == written.text_encoder.tapped_layers
    assert inferred.is_distilled
    same = ("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    assert all(inferred.text_encoder.qwen3[key] == written.text_encoder.qwen3[key] for key in same)


@pytest.mark.parametrize("style", ["diffusers", "bfl"])
@pytest.mark.parametrize("name", ["klein-4b", "klein-9b"])
def test_full_size_transformers_are_known_by_their_shapes(tmp_path, name, style):
    row = PUBLISHED_MODELS[name]
    file = hollow_file(tmp_path, "transformer", row.transformer, style)
    assert infer_config.transformer_config(open_checkpoint(file)) == row.transformer


@pytest.mark.parametrize("style", ["diffusers", "bfl"])
@pytest.mark.parametrize("row", [PUBLISHED_MODELS["klein-4b"], SMALL_DECODER], ids=["full", "small"])
def test_full_size_autoencoders_are_known_by_their_shapes(tmp_path, row, style):
    file = hollow_file(tmp_path, "vae", row.vae, style)
    assert infer_config.vae_config(open_checkpoint(file)) == row.vae


@pytest.mark.parametrize("name", ["klein-4b", "klein-9b"])
def test_full_size_text_encoders_are_known_by_their_shapes(tmp_path, name):
    row = PUBLISHED_MODELS[name]
    file = hollow_file(tmp_path, "text_encoder", row.text_encoder, "transformers")
    assert infer_config.text_encoder_config(open_checkpoint(file)) == row.text_encoder


PEAK = """
import resource, sys
from pathlib import Path
from klein_core.checkpoint.files import ModelFiles
from klein_core.denoiser.transformer import FlowTransformer
peak_bytes = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak_bytes()
network = FlowTransformer.from_folder(ModelFiles.alone("transformer", Path(sys.argv[1])))
print((peak_bytes() - before) / sum(parameter.nbytes for parameter in network.parameters()))
"""


def test_loading_needs_little_more_memory_than_the_weights(tmp_path):
    """The largest tensor is an eighth of this network; a copy of it would show."""
    shape = TransformerConfig(num_layers=1, num_single_layers=1, num_attention_heads=12)
    file = hollow_file(tmp_path, "transformer", shape, "diffusers")
    done = subprocess.run([sys.executable, "-c", PEAK, file], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.1


def test_a_bare_transformer_s_variant_is_named_or_asked_for(tmp_path):
    file = hollow_file(tmp_path, "transformer", PUBLISHED_MODELS["klein-9b"].transformer, "bfl")
    files = ModelFiles(transformer=file)
    with pytest.raises(CheckpointError) as caught:
        read_sampling(files)
    assert all(
        name in str(caught.value)
        for name in ("klein-9b", "klein-base-9b", "klein-9b-kv", "variant", str(file))
    )
    assert not read_sampling(replace(files, variant="klein-base-9b")).is_distilled
    assert read_sampling(replace(files, variant="klein-9b-kv")).uses_reference_cache
    with pytest.raises(CheckpointError, match="another shape"):
        read_sampling(replace(files, variant="klein-4b"))
    with pytest.raises(CheckpointError, match="no known variant"):
        read_sampling(replace(files, variant="klein-12b"))


def test_the_text_encoder_of_another_size_is_refused(tmp_path, folder):
    large = hollow_file(tmp_path, "text_encoder", PUBLISHED_MODELS["klein-9b"].text_encoder, "transformers")
    with pytest.raises(CheckpointError, match=r"another size: its hidden size is 4096, klein-4b needs 2560"):
        read_text_encoder_config(ModelFiles(text_encoder=large, variant="klein-4b"))
    with pytest.raises(CheckpointError, match="takes 96 text channels") as caught:
        read_variant(ModelFiles(model=folder, text_encoder=large))
    assert str(large) in str(caught.value)


def test_a_part_of_its_own_wins_over_the_model_s(folder, tmp_path):
    file = hollow_file(tmp_path, "vae", SMALL_DECODER.vae, "diffusers")
    files = ModelFiles(model=folder, vae=file)
    assert read_vae_config(files) == SMALL_DECODER.vae
    assert read_transformer_config(files) == read_transformer_config(folder)
    assert files.tokenizer_folder == folder / "tokenizer"
    # A whole model given for one part stands for that part of it.
    assert ModelFiles(vae=folder).path("vae") == folder / "vae"


def test_a_folder_without_config_json_is_told_by_its_tensors(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for component in ("transformer", "vae"):
        (copy / component / "config.json").unlink()
    assert read_variant(copy).transformer == read_variant(folder).transformer


def test_a_folder_with_one_bare_transformer_is_a_transformer(bare, tmp_path):
    file = tmp_path / "flux-2-klein.safetensors"
    file.write_bytes(bare.transformer.read_bytes())
    assert ModelFiles(model=tmp_path).path("transformer") == tmp_path
    assert read_transformer_config(tmp_path) == read_transformer_config(bare)
    assert read_sampling(ModelFiles(model=tmp_path, variant="klein-4b")).is_distilled


@pytest.mark.parametrize("missing", ["transformer", "vae", "text_encoder", "tokenizer"])
def test_parts_that_nobody_named_are_asked_for(bare, missing):
    with pytest.raises(CheckpointError, match=missing):
        Pipeline.from_folder(replace(bare, **{missing: None}))


def test_links_may_not_leave_the_folder_but_a_named_file_may_be_one(folder, bare, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.symlink_to(folder / "vae" / weights.name)
    with pytest.raises(CheckpointError, match="links that leave") as caught:
        ModelFiles.of(copy).open("vae")
    assert weights.name in str(caught.value)
    assert ModelFiles(model=copy, vae=weights).open("vae").files
    # Inside the model's folder they may point anywhere.
    weights.unlink()
    weights.symlink_to("../vae.safetensors")
    (copy / "vae.safetensors").write_bytes(bare.vae.read_bytes())
    assert ModelFiles.of(copy).open("vae").files
    (copy / "vae" / "config.json").unlink()
    (copy / "vae" / "config.json").symlink_to(folder / "vae" / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json is a link that leaves"):
        read_vae_config(copy)


def test_the_hub_s_cache_links_to_its_blobs(folder, tmp_path):
    repository = tmp_path / "models--owner--name"
    (repository / "blobs").mkdir(parents=True)
    vae = repository / "snapshots" / "abc" / "vae"
    vae.mkdir(parents=True)
    for number, name in enumerate(("config.json", "diffusion_pytorch_model.safetensors")):
        blob = repository / "blobs" / str(number)
        blob.write_bytes((folder / "vae" / name).read_bytes())
        (vae / name).symlink_to(f"../../../blobs/{number}")
    snapshot = vae.parent
    assert read_vae_config(snapshot) == read_vae_config(folder)
    assert ModelFiles.of(snapshot).open("vae").files
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    (vae / "diffusion_pytorch_model.safetensors").symlink_to(
        folder / "vae" / "diffusion_pytorch_model.safetensors"
    )
    with pytest.raises(CheckpointError, match="links that leave"):
        ModelFiles.of(snapshot).open("vae")


def test_an_index_that_names_links_out_of_the_folder_is_refused(folder, tmp_path):
    (tmp_path / "vae").mkdir()
    shard = tmp_path / "vae" / "model-00001-of-00001.safetensors"
    shard.symlink_to(folder / "vae" / "diffusion_pytorch_model.safetensors")
    names = dict.fromkeys(load_file(shard), shard.name)
    (tmp_path / "vae" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match="links that leave"):
        ModelFiles.of(tmp_path).open("vae")
