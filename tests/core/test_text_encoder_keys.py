"""Keys of the text encoder's config.json: honored as diffusers' pipeline does, refused, or without effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline

from klein_core.checkpoint.config_keys import TEXT_ENCODER
from klein_core.errors import CheckpointError
from klein_core.text_encoder.encoder import TextEncoder
from tests.tiny.text_encoder import save_tiny_text_encoder, tiny_tokenizer

PROMPT = "A cat on the mat, and another " * 2
SLIDING = ["full_attention", "sliding_attention"] * 2
HONORED: dict[str, list[dict[str, Any]]] = {
    "vocab_size": [{"vocab_size": 400}],
    "hidden_size": [{"hidden_size": 48}],
    "intermediate_size": [{"intermediate_size": 80}],
    "num_hidden_layers": [{"num_hidden_layers": 6}],
    "num_attention_heads": [{"num_attention_heads": 2}],
    "num_key_value_heads": [{"num_key_value_heads": 1}, {"num_key_value_heads": None}],
    "head_dim": [{"head_dim": 8}],
    "hidden_act": [{"hidden_act": "gelu"}],
    "rms_norm_eps": [{"rms_norm_eps": 0.3}],
    "rope_theta": [{"rope_theta": 10.0}],
    "rope_parameters": [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}},
    ],
    "rope_scaling": [
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16},
    ],
    "is_causal": [{"is_causal": False}],
    "use_sliding_window": [{"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}],
    "sliding_window": [{"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}],
    "max_window_layers": [{"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}],
    "layer_types": [{"use_sliding_window": True, "sliding_window": 4, "layer_types": SLIDING}],
    "max_position_embeddings": [
        {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    ],
    "text_encoder_out_layers": [{"text_encoder_out_layers": [1, 3]}],
    "max_sequence_length": [{"max_sequence_length": 48}],
}
"""Key → changes of the tiny model that give it another value."""
WITHOUT_EFFECT: dict[str, Any] = {
    "attention_dropout": 0.5,
    "initializer_range": 1.0,
    "use_cache": True,
    "tie_word_embeddings": False,
    "pad_token_id": 7,
    "bos_token_id": 3,
    "eos_token_id": [1, 2],
    "transformers_version": "9.9",
    "architectures": ["Qwen3Model"],
    "dtype": "float16",
    "torch_dtype": "float16",
    "is_encoder_decoder": True,
    "id2label": {"0": "a", "1": "b"},
    "label2id": {"a": 0, "b": 1},
    "problem_type": "regression",
    "chunk_size_feed_forward": 2,
    "attn_implementation": "eager",
    "output_hidden_states": [1],
    "output_attentions": True,
    "return_dict": False,
}


def config_path(folder: Path) -> Path:
    return folder / "text_encoder" / "config.json"


def embedding(folder: Path) -> torch.Tensor:
    [encoded] = TextEncoder.from_folder(folder).encode([PROMPT])
    return encoded.embedding


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    save_tiny_text_encoder(folder)
    return folder


def test_each_key_is_changed() -> None:
    # quantization_config is tested with the formats of quantized weights.
    assert HONORED.keys() | {"quantization_config"} == TEXT_ENCODER.honored
    assert WITHOUT_EFFECT.keys() == TEXT_ENCODER.without_effect


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(changes, id=f"{key}-{i}")
        for key, rows in HONORED.items()
        for i, changes in enumerate(rows)
    ],
)
def test_an_honored_key_means_what_it_means_to_diffusers(
    plain: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = save_tiny_text_encoder(tmp_path, **changes)
    taps = changes.get("text_encoder_out_layers", [1, 2, 3])
    length = changes.get("max_sequence_length", 64)
    with torch.no_grad():
        expected = Flux2KleinPipeline._get_qwen3_prompt_embeds(
            model, tiny_tokenizer(), PROMPT, max_sequence_length=length, hidden_states_layers=taps
        )[0]
    found = embedding(tmp_path)
    assert relative(found, expected) <= 1e-5
    before = embedding(plain)
    # The number of layers is above that of the last tap, and a larger vocabulary has other random weights.
    if "num_hidden_layers" not in changes and found.shape == before.shape:
        assert relative(found, before) > 1e-4


@pytest.mark.parametrize("key", WITHOUT_EFFECT)
def test_a_key_without_effect_has_none(plain: Path, tmp_path: Path, key: str) -> None:
    save_tiny_text_encoder(tmp_path)
    config = json.loads(config_path(tmp_path).read_text())
    config_path(tmp_path).write_text(json.dumps(config | {key: WITHOUT_EFFECT[key]}))
    assert torch.equal(embedding(tmp_path), embedding(plain))


@pytest.mark.parametrize("key", TEXT_ENCODER.fixed)
def test_a_fixed_key_is_refused_by_name(tmp_path: Path, key: str) -> None:
    save_tiny_text_encoder(tmp_path)
    config = json.loads(config_path(tmp_path).read_text())
    config_path(tmp_path).write_text(json.dumps(config | {key: "other"}))
    with pytest.raises(CheckpointError, match=f"{key} is 'other'; only"):
        TextEncoder.from_folder(tmp_path)
