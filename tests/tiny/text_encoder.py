"""A tiny random Qwen3 and a tiny byte-level tokenizer with Qwen's special tokens and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tests.tiny.vae import spread_weights

SHAPE: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 1024,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "text_encoder_out_layers": [1, 2, 3],
    "max_sequence_length": 64,
}
"""Four layers tapped at 1, 2, 3: klein's ratio of 9, 18, 27 to 36."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content "
    "~ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)

_MERGES = [
    "Ċ Ċ",
    "t h",
    "th e",
    "Ġ the",
    "i n",
    "a n",
    "Ġ an",
    "e r",
    "o n",
    "r e",
    "e d",
    "Ġ c",
    "Ġc a",
    "Ġca t",
]
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tiny_qwen3(seed: int = 0, **changes: Any) -> Qwen3ForCausalLM:
    """Builds transformers' model, lm_head and unneeded last layer included, with visible spread."""
    model = Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, **changes})).eval().requires_grad_(False)
    spread_weights(model, torch.Generator().manual_seed(seed))
    return model


def tiny_tokenizer() -> Qwen2TokenizerFast:
    """Builds a tokenizer whose pads, templates and special tokens behave as klein's."""
    pieces = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in _MERGES)]
    tokenizer = Qwen2TokenizerFast(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[tuple(merge.split(" ")) for merge in _MERGES],
        pad_token=_SPECIAL[0],
        eos_token=_SPECIAL[2],
        extra_special_tokens=list(_SPECIAL[1:2]),
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>")])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tiny_text_encoder(checkpoint_folder: Path, seed: int = 0, **changes: Any) -> Qwen3ForCausalLM:
    """Writes `text_encoder/` and `tokenizer/` in diffusers' layout and returns the model."""
    model = tiny_qwen3(seed, **changes)
    model.save_pretrained(checkpoint_folder / "text_encoder")
    tiny_tokenizer().save_pretrained(checkpoint_folder / "tokenizer")
    return model
