"""Model shapes that benchmarks build with random weights: real kleins and a quarter-size one for a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from klein_core.model_registry import PUBLISHED_MODELS, PublishedModel
from klein_core.variants import TextEncoderConfig, TransformerConfig, VaeConfig


@dataclass(frozen=True)
class Shape:
    """One model's three parts."""

    transformer: TransformerConfig
    text_encoder: TextEncoderConfig
    vae: VaeConfig


def qwen3(
    hidden: int, intermediate: int, heads: int, key_value_heads: int, vocabulary: int
) -> dict[str, Any]:
    """Returns a Qwen3 configuration of 36 layers, the depth of Qwen3-4B and 8B."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": 128,
        "num_hidden_layers": 36,
        "vocab_size": vocabulary,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "attention_bias": False,
    }


def _published(row: PublishedModel) -> Shape:
    return Shape(row.transformer, row.text_encoder, row.vae)


SHAPES = {
    # For rehearsals: each part takes less than a second.
    "tiny": Shape(
        TransformerConfig(
            num_layers=1,
            num_single_layers=2,
            num_attention_heads=2,
            joint_attention_dim=192,
        ),
        TextEncoderConfig(qwen3(64, 128, 2, 1, 151_936)),
        VaeConfig(block_out_channels=(32, 32, 32, 32)),
    ),
    # Half of klein-4B's width and half of its depth: a step that a laptop's processor can do in seconds.
    "quarter": Shape(
        TransformerConfig(
            num_layers=3, num_single_layers=10, num_attention_heads=12, joint_attention_dim=1920
        ),
        TextEncoderConfig(qwen3(640, 2432, 8, 2, 37984)),
        VaeConfig(block_out_channels=(64, 128, 256, 256)),
    ),
    **{name: _published(PUBLISHED_MODELS[name]) for name in ("klein-4b", "klein-9b")},
}
