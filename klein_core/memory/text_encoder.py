"""What the text encoder takes: Qwen3 up to its last tapped layer, one prompt at a time. Torch-free."""

from __future__ import annotations

from klein_core.memory.precision import Precision
from klein_core.variants import TextEncoderConfig

_DEFAULT_HEAD_DIM = 128
_FP32 = 4


def weight_bytes(config: TextEncoderConfig, precision: Precision) -> int:
    """Returns what the needed weights take; the token table is never quantized."""
    layers = max(config.tapped_layers)
    head, size = _head_dim(config), config.hidden_size
    table = int(config.qwen3["vocab_size"]) * size
    norms = layers * (2 * size + 2 * head)
    matrices = sum(precision.matrix_bytes(*matrix) for matrix in _layer_matrices(config))
    return (table + norms) * precision.value_bytes + layers * matrices


def encode_bytes(config: TextEncoderConfig, precision: Precision, *, emulated: bool = False) -> int:
    """Returns the most that encoding one prompt takes beside the weights.

    Every layer's output stays until the end. On top of that, either the last layer is at its fullest, or the tapped
    outputs are being copied side by side.

    Args:
        config: the network.
        precision: of its weights.
        emulated: a processor that multiplies bfloat16 as fp32 copies, both factors and the product.
    """
    length, value = config.sequence_length, precision.value_bytes
    states = (max(config.tapped_layers) + 1) * config.hidden_size
    inside = max(_feed_forward(config, precision, emulated and value < _FP32))
    return length * states * value + max(inside, length * config.embedding_channels * value)


def _feed_forward(config: TextEncoderConfig, precision: Precision, emulated: bool) -> tuple[int, int]:
    """Returns what is alive while the second wide product is made, and while both wide ones are multiplied."""
    size, inner, length = config.hidden_size, _inner(config), config.sequence_length
    largest = max(rows * columns for rows, columns in _layer_matrices(config))
    unfolded = largest * precision.value_bytes if precision.is_quantized else 0
    copies = (largest + length * (size + inner)) * _FP32 if emulated else 0
    making = length * 2 * (size + inner) * precision.value_bytes + unfolded + copies
    return making, length * (2 * size + 3 * inner) * precision.value_bytes + unfolded


def _layer_matrices(config: TextEncoderConfig) -> list[tuple[int, int]]:
    heads, size, head = int(config.qwen3["num_attention_heads"]), config.hidden_size, _head_dim(config)
    inner = _inner(config)
    narrow = int(config.qwen3.get("num_key_value_heads") or heads) * head
    attention = [(heads * head, size), (narrow, size), (narrow, size), (size, heads * head)]
    return [*attention, (inner, size), (inner, size), (size, inner)]


def _inner(config: TextEncoderConfig) -> int:
    return int(config.qwen3["intermediate_size"])


def _head_dim(config: TextEncoderConfig) -> int:
    return int(config.qwen3.get("head_dim") or _DEFAULT_HEAD_DIM)
