"""How the needed part of Qwen3 is named in checkpoints. Torch-free. Source: model facts 1.2 and 6.3."""

from __future__ import annotations

import re
from collections.abc import Callable

from klein_core.checkpoint.sources import Piece
from klein_core.variants import TextEncoderConfig

EMBEDDING = "embed_tokens.weight"
_LAYER = (
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_UNNEEDED = re.compile(r"(.*\.)?(lm_head\.|(model\.)?norm\.weight$|layers\.\d+\.self_attn\.rotary_emb\.)")
_LAYER_NUMBER = re.compile(r"(?:.*\.)?layers\.(\d+)\.")


def text_encoder_sources(config: TextEncoderConfig) -> dict[str, tuple[Piece, ...]]:
    """Returns every parameter up to the last tapped layer with its name in a checkpoint, without any prefix."""
    layers = range(max(config.tapped_layers))
    names = [EMBEDDING, *(f"layers.{layer}.{part}.weight" for layer in layers for part in _LAYER)]
    return {name: (Piece(name),) for name in names}


def is_past(config: TextEncoderConfig) -> Callable[[str], bool]:
    """Returns a test for stored tensors that come after the last tapped layer: they are not needed."""
    layer_count = max(config.tapped_layers)

    def past(name: str) -> bool:
        layer = _LAYER_NUMBER.match(name)
        return bool(_UNNEEDED.match(name)) or (layer is not None and int(layer[1]) >= layer_count)

    return past
