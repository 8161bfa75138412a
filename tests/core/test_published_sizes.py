"""The full-size models, built without memory: names, shapes and counts are those of the published files."""

from __future__ import annotations

from math import prod

import pytest
import torch

from klein_core.checkpoint.key_mapping import BFL, DIFFUSERS, TensorSlice
from klein_core.checkpoint.key_maps import transformer_key_map, vae_key_map
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.model_registry import PUBLISHED_MODELS, SMALL_DECODER
from klein_core.text_encoder.encoder import build_cut_qwen3
from klein_core.vae_decoder.autoencoder import Autoencoder
from klein_core.variants import VaeConfig
from tests.core import published_tensors as published

EACH = pytest.mark.parametrize("row", PUBLISHED_MODELS.values(), ids=lambda row: row.name)

# Of the published files: parameters; tensors in a diffusers folder and in the single file.
TRANSFORMERS = {3072: (3_875_544_576, 169, 149), 4096: (9_078_581_248, 233, 201)}
PUBLISHED = {DIFFUSERS: published.transformer, BFL: published.bfl_transformer}
# Of Qwen3-4B and -8B: all parameters (a tied head counts once), and those up to the last tapped layer.
TEXT_ENCODERS = {2560: (4_022_468_096, 3_114_088_192), 4096: (8_190_735_360, 5_831_883_520)}


def count(shapes):
    return sum(map(prod, shapes.values()))


def filled_from(module, key_map, stored):
    """Checks that stored tensors of these shapes fill `module` by `key_map`; returns the names that are used up.

    A stored tensor is used up when each of its rows goes to exactly one parameter.
    """
    taken = {name: [] for name in stored}
    for target, value in module.state_dict().items():
        if target not in key_map:
            continue
        rows = 0
        for each in key_map[target]:
            shape = stored[each.name]
            if each.is_pointwise:
                assert shape[2:] == (1, 1)
                shape = shape[:2]
            assert shape[1:] == tuple(value.shape[1:]), target
            chosen = each.row_range(shape[0])
            taken[each.name] += chosen
            rows += len(chosen)
        assert rows == value.shape[0], target
    return {
        name for name, rows in taken.items() if stored[name] and sorted(rows) == list(range(stored[name][0]))
    }


def rows_of(slices, stored):
    """Returns the slices with explicit ends, neighbors joined."""
    rows = []
    for each in slices:
        chosen = each.row_range(stored[each.name][0])
        if rows and rows[-1][0] == each.name and rows[-1][2] == chosen.start:
            rows[-1] = (each.name, rows[-1][1], chosen.stop)
        else:
            rows.append((each.name, chosen.start, chosen.stop))
    return rows


def dimensions(row):
    shape = row.transformer
    return (shape.num_layers, shape.num_single_layers, shape.hidden_size, shape.joint_attention_dim)


@EACH
@pytest.mark.parametrize("style", [DIFFUSERS, BFL])
def test_the_transformer_has_the_published_names_shapes_and_count(row, style):
    parameters, *tensors = TRANSFORMERS[row.transformer.hidden_size]
    with torch.device("meta"):
        module = FlowTransformer(row.transformer)
    stored = PUBLISHED[style](*dimensions(row))
    key_map = transformer_key_map(row.transformer, style)
    assert key_map.keys() == module.state_dict().keys()
    assert filled_from(module, key_map, stored) == stored.keys()
    assert count(stored) == sum(p.numel() for p in module.parameters()) == parameters
    assert len(stored) == tensors[style == BFL]


@EACH
def test_each_row_of_the_single_file_goes_where_its_diffusers_name_says(row):
    doubles, singles, d, text = dimensions(row)
    stored = published.bfl_transformer(doubles, singles, d, text)
    expected = published.rows_in_bfl(doubles, singles, d)
    authors = transformer_key_map(row.transformer, BFL)
    for target, parts in transformer_key_map(row.transformer, DIFFUSERS).items():
        rows = [published_rows for part in parts for published_rows in expected.pop(part.name)]
        joined = rows_of([TensorSlice(*published_rows) for published_rows in rows], stored)
        assert rows_of(authors[target], stored) == joined, target
    assert not expected


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
    widths = (config.block_out_channels, config.decoder_block_out_channels or config.block_out_channels)
    diffusers = published.vae(*widths)
    authors = published.vae(*widths, published.BFL_VAE)
    for style, stored in ((DIFFUSERS, diffusers), (BFL, authors)):
        key_map = vae_key_map(config, style)
        assert filled_from(module, key_map, stored) == stored.keys() - {"bn.num_batches_tracked"}
        assert len(stored) == 251
    same = dict(zip(diffusers, authors, strict=True))
    moved = {name: slices[0].name for name, slices in vae_key_map(config, BFL).items()}
    assert moved == {name: same[name] for name in vae_key_map(config, DIFFUSERS)}
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == diffusers
    assert sum(p.numel() for p in module.parameters()) == parameters
    assert sum(p.numel() for p in module.decoder.parameters()) == of_decoder
    assert sum(p.numel() for p in module.encoder.parameters()) == 34_421_696
