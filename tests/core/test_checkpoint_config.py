"""Configuration files read as written, and every unsupported value rejected by name."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys

import pytest

from klein_core.checkpoint.config import read_sampling, read_variant
from klein_core.errors import CheckpointError
from klein_core.variants import NoiseSchedule
from tests.tiny.checkpoint import save_tiny_checkpoint


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The configuration files of a tiny checkpoint, as texts."""
    folder = tmp_path_factory.mktemp("written")
    save_tiny_checkpoint(folder)
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.json")}


@pytest.fixture
def folder(written, tmp_path):
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def change(path, **values):
    """Sets keys; a value of `...` removes the key."""
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def test_a_saved_checkpoint_is_read_as_it_was_made(folder):
    variant = read_variant(folder)
    assert variant.is_distilled
    assert variant.default_step_count == 4
    assert variant.transformer.num_single_layers == 3
    assert variant.transformer.axes_dims_rope == (4, 4, 4, 4)
    assert variant.vae.decoder_block_out_channels == (32, 32, 32, 32)
    assert variant.vae.packed_channels == variant.transformer.in_channels == 16
    assert variant.text_encoder.tapped_layers == (1, 2, 3)
    assert variant.text_encoder.sequence_length == 64
    assert variant.text_encoder.embedding_channels == variant.transformer.joint_attention_dim == 96


def test_absent_keys_mean_kleins_values(folder):
    change(folder / "model_index.json", is_distilled=...)
    change(folder / "vae/config.json", batch_norm_eps=..., decoder_block_out_channels=..., patch_size=...)
    change(
        folder / "text_encoder/config.json",
        num_hidden_layers=36,
        text_encoder_out_layers=...,
        max_sequence_length=...,
    )
    change(folder / "transformer/config.json", rope_theta=..., eps=...)
    variant = read_variant(folder)
    assert not variant.is_distilled
    assert variant.default_guidance_scale == 4.0
    assert variant.vae.batch_norm_eps == 1e-4
    assert variant.vae.decoder_block_out_channels is None
    assert variant.text_encoder.tapped_layers == (9, 18, 27)
    assert variant.text_encoder.sequence_length == 512
    assert variant.transformer.rope_theta == 2000


def test_the_pipelines_class_says_whether_references_are_kept(folder):
    assert not read_variant(folder).uses_reference_cache
    change(folder / "model_index.json", _class_name="Flux2KleinKVPipeline")
    assert read_variant(folder).uses_reference_cache
    # Without the key, each class means its own default: base without a cache, distilled with one.
    change(folder / "model_index.json", is_distilled=...)
    assert read_variant(folder).is_distilled


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("model_index.json", "_class_name", "Flux2Pipeline"),
        ("model_index.json", "_class_name", ...),
        ("model_index.json", "is_distilled", "yes"),
        ("model_index.json", "text_encoder", ["transformers", "Mistral3ForConditionalGeneration"]),
        ("model_index.json", "scheduler", ["diffusers", "EulerDiscreteScheduler"]),
        ("model_index.json", "vae", ...),
        ("model_index.json", "vae", [None, None]),
        ("transformer/config.json", "_class_name", "FluxTransformer2DModel"),
        ("transformer/config.json", "guidance_embeds", True),
        ("transformer/config.json", "patch_size", 2),
        ("transformer/config.json", "out_channels", 32),
        ("transformer/config.json", "num_layers", ...),
        ("transformer/config.json", "num_layers", -1),
        ("transformer/config.json", "num_layers", 2.5),
        ("transformer/config.json", "num_layers", True),
        ("transformer/config.json", "axes_dims_rope", [4, 4, 4]),
        ("transformer/config.json", "axes_dims_rope", "4444"),
        ("transformer/config.json", "num_layers", 10**6),
        ("transformer/config.json", "num_single_layers", 10**6),
        ("transformer/config.json", "num_attention_heads", 10**12),
        ("transformer/config.json", "num_attention_heads", 10**6),
        ("transformer/config.json", "in_channels", 10**400),
        ("transformer/config.json", "mlp_ratio", math.inf),
        ("transformer/config.json", "mlp_ratio", math.nan),
        ("transformer/config.json", "mlp_ratio", 1e9),
        ("transformer/config.json", "mlp_ratio", 1e-9),
        ("transformer/config.json", "rope_theta", 10**400),
        ("transformer/config.json", "axes_dims_rope", [1, 1, 1, 13]),
        ("transformer/config.json", "axes_dims_rope", [4] * 10**6),
        ("transformer/config.json", "timestep_guidance_channels", 255),
        ("transformer/config.json", "rope_theta", 0),
        ("transformer/config.json", "rope_theta", "2000"),
        ("transformer/config.json", "quantization_config", {"quant_method": "torchao"}),
        ("vae/config.json", "_class_name", "AutoencoderKL"),
        ("vae/config.json", "act_fn", "relu"),
        ("vae/config.json", "patch_size", [1, 1]),
        ("vae/config.json", "norm_num_groups", 5),
        ("vae/config.json", "block_out_channels", [32, 64]),
        ("vae/config.json", "latent_channels", 10**12),
        ("vae/config.json", "layers_per_block", 10**6),
        ("vae/config.json", "batch_norm_eps", math.inf),
        ("vae/config.json", "sample_size", 8),
        ("vae/config.json", "sample_size", 32),
        ("vae/config.json", "sample_size", 80),
        ("vae/config.json", "use_quant_conv", 1),
        ("text_encoder/config.json", "model_type", "qwen2"),
        ("text_encoder/config.json", "text_encoder_out_layers", []),
        ("text_encoder/config.json", "text_encoder_out_layers", [1, 2, 4]),
        ("text_encoder/config.json", "text_encoder_out_layers", [0, 1, 2]),
        ("text_encoder/config.json", "max_sequence_length", 0),
        ("text_encoder/config.json", "max_sequence_length", 10**12),
        ("text_encoder/config.json", "num_hidden_layers", 10**6),
        ("text_encoder/config.json", "vocab_size", 10**12),
        ("text_encoder/config.json", "head_dim", 10**12),
        ("text_encoder/config.json", "hidden_size", ...),
        ("scheduler/scheduler_config.json", "_class_name", "EulerDiscreteScheduler"),
        ("scheduler/scheduler_config.json", "time_shift_type", "cosine"),
        ("scheduler/scheduler_config.json", "use_dynamic_shifting", "no"),
        ("scheduler/scheduler_config.json", "shift", 0),
        ("scheduler/scheduler_config.json", "use_flow_sigmas", True),
        ("scheduler/scheduler_config.json", "use_karras_sigmas", True),
        ("scheduler/scheduler_config.json", "shift_terminal", 0.02),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 500),
    ],
)
def test_what_is_not_supported_is_refused_by_file_and_name(folder, file, key, value):
    change(folder / file, **{key: value})
    with pytest.raises(CheckpointError) as caught:
        read_variant(folder)
    assert file.split("/")[0] in str(caught.value)
    assert key in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("file", "key", "value", "word"),
    [
        ("vae/config.json", "latent_channels", 8, "latent channels"),
        ("text_encoder/config.json", "text_encoder_out_layers", [1, 2], "text channels"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(folder, file, key, value, word):
    change(folder / file, **{key: value})
    with pytest.raises(CheckpointError, match=word):
        read_variant(folder)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\x00"])
def test_malformed_and_missing_files_are_named(folder, text):
    path = folder / "vae/config.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"vae/config\.json"):
        read_variant(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"vae/config\.json is missing"):
        read_variant(folder)


def test_it_needs_no_torch():
    script = "import sys, klein_core.checkpoint.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_only_a_stage_that_is_mounted_alone_may_lack_the_scheduler(folder):
    shutil.rmtree(folder / "scheduler")
    assert read_sampling(folder).schedule == NoiseSchedule()
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json is missing"):
        read_variant(folder)
