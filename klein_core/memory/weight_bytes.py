"""Bytes of the weights of each network, exactly, in any precision. Torch-free."""

from __future__ import annotations

from itertools import pairwise

from klein_core.memory.precision import Precision
from klein_core.variants import TextEncoderConfig, TransformerConfig, VaeConfig

_DEFAULT_HEAD_DIM = 128


def text_encoder_bytes(config: TextEncoderConfig, precision: Precision) -> int:
    """Returns the bytes of Qwen3 up to its last tapped layer; the token table is never quantized."""
    layers = max(config.tapped_layers)
    head_dim, size = int(config.qwen3.get("head_dim") or _DEFAULT_HEAD_DIM), config.hidden_size
    table = int(config.qwen3["vocab_size"]) * size
    norms = layers * (2 * size + 2 * head_dim)
    matrices = sum(precision.matrix_bytes(*matrix) for matrix in text_encoder_matrices(config))
    return (table + norms) * precision.value_bytes + layers * matrices


def text_encoder_matrices(config: TextEncoderConfig) -> list[tuple[int, int]]:
    """Returns (rows, columns) of every matrix of one layer."""
    heads, size = int(config.qwen3["num_attention_heads"]), config.hidden_size
    head_dim = int(config.qwen3.get("head_dim") or _DEFAULT_HEAD_DIM)
    key_value = int(config.qwen3.get("num_key_value_heads") or heads) * head_dim
    inner = int(config.qwen3["intermediate_size"])
    attention = [(heads * head_dim, size), (key_value, size), (key_value, size), (size, heads * head_dim)]
    return [*attention, (inner, size), (inner, size), (size, inner)]


def transformer_bytes(config: TransformerConfig, precision: Precision) -> int:
    """Returns the bytes of the whole transformer."""
    return _outer_bytes(config, precision.value_bytes) + sum(block_bytes(config, precision))


def block_bytes(config: TransformerConfig, precision: Precision) -> list[int]:
    """Returns the bytes of each block, in the blocks' order."""
    head_norms = config.attention_head_dim * precision.value_bytes
    matrices = transformer_matrices(config)
    double = 2 * sum(precision.matrix_bytes(*matrix) for matrix in matrices[:4]) + 4 * head_norms
    single = sum(precision.matrix_bytes(*matrix) for matrix in matrices[4:]) + 2 * head_norms
    return [double] * config.num_layers + [single] * config.num_single_layers


def transformer_matrices(config: TransformerConfig) -> list[tuple[int, int]]:
    """Returns (rows, columns) of the four matrices of a double-stream block's stream, then of a single-stream block."""
    size, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    double = [(3 * size, size), (size, size), (2 * inner, size), (size, inner)]
    return [*double, (3 * size + 2 * inner, size), (size, size + inner)]


def offloaded_bytes(config: TransformerConfig, precision: Precision) -> int:
    """Returns the bytes that stay on the device when blocks are offloaded: everything else, and two blocks."""
    blocks = block_bytes(config, precision)
    pairs = [sum(pair) for pair in zip(blocks, [*blocks[1:], blocks[0]], strict=True)]
    return _outer_bytes(config, precision.value_bytes) + max(pairs)


def pinned_bytes(config: TransformerConfig, precision: Precision) -> int:
    """Returns the bytes of host memory that offloaded blocks take.

    Each block is one pinned allocation, and torch rounds those up to powers of two (`CachingHostAllocator.h`).
    """
    return sum(1 << (block - 1).bit_length() for block in block_bytes(config, precision))


def _outer_bytes(config: TransformerConfig, value_bytes: int) -> int:
    """Returns the bytes of the weights outside of the blocks, which are never quantized."""
    size = config.hidden_size
    time = config.timestep_guidance_channels * size + size * size
    modulations = (6 + 6 + 3 + 2) * size * size
    embedders = (2 * config.in_channels + config.joint_attention_dim) * size
    return (time + modulations + embedders) * value_bytes


def vae_bytes(config: VaeConfig, value_bytes: int) -> int:
    """Returns the bytes of the autoencoder, encoder and decoder; its weights are never quantized."""
    latent = config.latent_channels
    encoder = config.block_out_channels
    decoder = tuple(reversed(config.decoder_block_out_channels or encoder))
    values = _conv(config.in_channels, encoder[0]) + _conv(latent, decoder[0])
    values += _levels(encoder, config.layers_per_block) + _levels(decoder, config.layers_per_block + 1)
    for width in (encoder[-1], decoder[0]):
        attention = 2 * width + 4 * (width * width + width) if config.mid_block_add_attention else 0
        values += 2 * _residual_block(width, width) + attention
    values += 2 * encoder[-1] + _conv(encoder[-1], 2 * latent)
    values += 2 * decoder[-1] + _conv(decoder[-1], config.out_channels)
    values += _conv(2 * latent, 2 * latent, 1) if config.use_quant_conv else 0
    values += _conv(latent, latent, 1) if config.use_post_quant_conv else 0
    return (values + 2 * config.packed_channels) * value_bytes


def _levels(widths: tuple[int, ...], blocks: int) -> int:
    values = sum(_conv(width, width) for width in widths[:-1])
    for before, width in pairwise((widths[0], *widths)):
        values += _residual_block(before, width) + (blocks - 1) * _residual_block(width, width)
    return values


def _residual_block(before: int, width: int) -> int:
    shortcut = _conv(before, width, 1) if before != width else 0
    return 2 * before + _conv(before, width) + 2 * width + _conv(width, width) + shortcut


def _conv(before: int, width: int, side: int = 3) -> int:
    return (before * side * side + 1) * width
