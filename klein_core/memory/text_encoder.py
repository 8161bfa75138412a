"""What the text encoder takes: Qwen3 up to its last tapped layer, one prompt at a time. Torch-free."""

from __future__ import annotations

from klein_core.memory.precision import Precision
from klein_core.variants import TextEncoderConfig

_DEFAULT_HEAD_DIM = 128


def weight_bytes(config: TextEncoderConfig, precision: Precision) -> int:
    """Returns what the needed weights take; the token table is never quantised."""
    layers = max(config.tapped_layers)
    head, size = _head_dim(config), config.hidden_size
    table = int(config.qwen3["vocab_size"]) * size
    norms = layers * (2 * size + 2 * head)
    matrices = sum(precision.matrix_bytes(*matrix) for matrix in _layer_matrices(config))
    return (table + norms) * precision.value_bytes + layers * matrices


def encode_bytes(config: TextEncoderConfig, precision: Precision) -> int:
    """Returns the most that encoding one prompt takes beside the weights.

    Every layer's output stays until the end. On top of that, either the last layer is at its fullest, with three
    tensors as wide as its feed-forward, or the tapped outputs are being copied side by side.
    """
    layers, length = max(config.tapped_layers), config.sequence_length
    states = (layers + 1) * config.hidden_size
    inside = 2 * config.hidden_size + 3 * int(config.qwen3["intermediate_size"])
    values = length * (states + max(inside, config.embedding_channels)) * precision.value_bytes
    if not precision.is_quantised:
        return values
    return values + max(rows * columns for rows, columns in _layer_matrices(config)) * precision.value_bytes


def _layer_matrices(config: TextEncoderConfig) -> list[tuple[int, int]]:
    heads, size, head = int(config.qwen3["num_attention_heads"]), config.hidden_size, _head_dim(config)
    inner = int(config.qwen3["intermediate_size"])
    narrow = int(config.qwen3.get("num_key_value_heads") or heads) * head
    attention = [(heads * head, size), (narrow, size), (narrow, size), (size, heads * head)]
    return [*attention, (inner, size), (inner, size), (size, inner)]


def _head_dim(config: TextEncoderConfig) -> int:
    return int(config.qwen3.get("head_dim") or _DEFAULT_HEAD_DIM)
