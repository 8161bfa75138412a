"""The full-size models, built without memory: names, shapes and counts are those of the published files."""

from __future__ import annotations

from math import prod

import pytest
import torch

from klein_core.denoiser.checkpoint import checkpoint_names
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.known_variants import KNOWN_VARIANTS, SMALL_DECODER
from klein_core.text_encoder.encoder import build_cut_qwen3
from klein_core.vae_decoder.autoencoder import Autoencoder
from klein_core.variants import VaeConfig
from tests.core import published_tensors as published

EACH = pytest.mark.parametrize("row", KNOWN_VARIANTS.values(), ids=lambda row: row.name)

# Of the published files: parameters; tensors in a diffusers folder and in the single file.
TRANSFORMERS = {3072: (3_875_544_576, 169, 149), 4096: (9_078_581_248, 233, 201)}
# Of Qwen3-4B and -8B: all parameters (a tied head counts once), and those up to the last tapped layer.
TEXT_ENCODERS = {2560: (4_022_468_096, 3_114_088_192), 4096: (8_190_735_360, 5_831_883_520)}


def count(shapes):
    return sum(map(prod, shapes.values()))


def of_diffusers(module, names):
    """Names and shapes that a diffusers folder must have to fill `module`: what it fuses is taken apart."""
    shapes = {}
    for target, value in module.state_dict().items():
        parts = names.get(target, (target,))
        rows = [value.shape[0] // len(parts), *value.shape[1:]] if value.shape else []
        shapes |= dict.fromkeys(parts, tuple(rows))
    return shapes


def dimensions(row):
    shape = row.transformer
    return (shape.num_layers, shape.num_single_layers, shape.hidden_size, shape.joint_attention_dim)


@EACH
def test_the_transformer_has_the_published_names_shapes_and_count(row):
    parameters, tensors, _ = TRANSFORMERS[row.transformer.hidden_size]
    with torch.device("meta"):
        module = FlowTransformer(row.transformer)
    expected = published.transformer(*dimensions(row))
    assert of_diffusers(module, checkpoint_names(row.transformer)) == expected
    assert count(expected) == sum(p.numel() for p in module.parameters()) == parameters
    assert len(expected) == tensors


@EACH
def test_the_single_file_holds_the_same_parameters(row):
    parameters, _, tensors = TRANSFORMERS[row.transformer.hidden_size]
    single = published.bfl_transformer(*dimensions(row))
    assert (count(single), len(single)) == (parameters, tensors)


@EACH
def test_the_cut_text_encoder_has_the_published_names_and_shapes(row):
    config = row.text_encoder.qwen3
    all_parameters, needed_parameters = TEXT_ENCODERS[config["hidden_size"]]
    file = published.qwen3(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        inner=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        vocabulary=config["vocab_size"],
    )
    tied = prod(file["lm_head.weight"]) if config["tie_word_embeddings"] else 0
    assert (count(file) - tied, len(file)) == (all_parameters, 399)
    cut = build_cut_qwen3(row.text_encoder)
    assert all(p.is_meta for p in cut.parameters())
    needed = {f"model.{name}": tuple(value.shape) for name, value in cut.state_dict().items()}
    assert needed.items() <= file.items()
    assert count(needed) == needed_parameters


@pytest.mark.parametrize(
    ("config", "parameters", "of_decoder"),
    [(VaeConfig(), 84_046_115, 49_619_203), (SMALL_DECODER.vae, 62_373_091, 27_946_179)],
    ids=["full", "small-decoder"],
)
def test_the_autoencoder_has_the_published_names_shapes_and_count(config, parameters, of_decoder):
    with torch.device("meta"):
        module = Autoencoder(config)
    decoder = config.decoder_block_out_channels or config.block_out_channels
    expected = published.vae(config.block_out_channels, decoder)
    assert of_diffusers(module, {}) == expected
    assert len(expected) == 251
    assert sum(p.numel() for p in module.parameters()) == parameters
    assert sum(p.numel() for p in module.decoder.parameters()) == of_decoder
    assert sum(p.numel() for p in module.encoder.parameters()) == 34_421_696
