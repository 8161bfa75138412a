"""What the autoencoder's activations take, from the tensors that are alive at each of its layers.

Torch-free. Everything is counted in values first: the precision is the caller's.
"""

from __future__ import annotations

from itertools import pairwise

from klein_core.variants import VaeConfig

_FP32 = 4


def decode_bytes(
    config: VaeConfig, width_px: int, height_px: int, value_bytes: int, *, emulated: bool = False
) -> int:
    """Returns the most that decoding one image takes beside the weights, its pixels included.

    `emulated` is a processor that convolves bfloat16 as fp32 copies, of features and result.
    """
    copies = _copies(value_bytes, emulated)
    return int(_decoder_values(config, width_px * height_px, copies) * value_bytes)


def encode_bytes(
    config: VaeConfig, width_px: int, height_px: int, value_bytes: int, *, emulated: bool = False
) -> int:
    """Returns the most that encoding one image takes beside the weights, its pixels included; see `decode_bytes`."""
    copies = _copies(value_bytes, emulated)
    return int(_encoder_values(config, width_px * height_px, copies) * value_bytes)


def _copies(value_bytes: int, emulated: bool) -> int:
    """Returns how many values' room the fp32 copy of one value takes, where one is made."""
    return _FP32 // value_bytes if emulated and value_bytes < _FP32 else 0


def tiled_size_px(config: VaeConfig, width_px: int, height_px: int) -> tuple[int, int]:
    """Returns the size of the largest tile of an image."""
    return min(width_px, config.sample_size), min(height_px, config.sample_size)


def _decoder_values(config: VaeConfig, pixels: int, copies: int) -> int:
    widths = tuple(reversed(config.decoder_block_out_channels or config.block_out_channels))
    area: int = pixels // 4 ** (len(widths) - 1)
    peak = _middle_values(widths[0], area, config, copies)
    for level, (before, width) in enumerate(pairwise((widths[0], *widths))):
        blocks = [(before, width)] + [(width, width)] * config.layers_per_block
        peak = max(peak, _level_values(blocks, area, copies))
        if level + 1 < len(widths):
            # The level's own input, the features, their double and what the convolution makes of that.
            resampled = width * 4 * area
            peak = max(peak, (before + width) * area + resampled + _convolved(resampled, resampled, copies))
            area *= 4
    head = max(3, 2 + copies) * widths[-1] * area
    return max(peak, head) + config.out_channels * area


def _encoder_values(config: VaeConfig, pixels: int, copies: int) -> int:
    widths, area = config.block_out_channels, pixels
    peak = _convolved(config.in_channels * area, widths[0] * area, copies)
    for level, (before, width) in enumerate(pairwise((widths[0], *widths))):
        blocks = [(before, width)] + [(width, width)] * (config.layers_per_block - 1)
        peak = max(peak, _level_values(blocks, area, copies))
        if level + 1 < len(widths):
            # The level's own input, the features, their padded copy and half as many rows and columns.
            padded, halved = width * area, width * area // 4
            peak = max(peak, (before + width) * area + padded + _convolved(padded, halved, copies))
            area //= 4
    peak = max(peak, _middle_values(widths[-1], area, config, copies))
    return peak + config.in_channels * pixels


def _convolved(features: int, result: int, copies: int) -> int:
    """Returns the most values that a convolution adds to the features it is given, its result included."""
    return max(copies * (features + result), (copies + 1) * result)


def _level_values(blocks: list[tuple[int, int]], area: int, copies: int) -> int:
    """Returns the most values of a level's residual blocks; its own input lives as long as they run."""
    first, *others = blocks
    kept = first[0]
    inside = [_residual_width(*first, copies)] + [kept + _residual_width(*block, copies) for block in others]
    return area * max(inside)


def _residual_width(before: int, width: int, copies: int) -> int:
    """Returns channels alive at most: the input with its norm and activation, or at one of the convolutions."""
    first = 2 * before + _convolved(before, width, copies)
    second = before + 2 * width + _convolved(width, width, copies)
    shortcut = before + width + _convolved(before, width, copies) if before != width else 0
    return max(3 * before, first, second, shortcut)


def _middle_values(width: int, area: int, config: VaeConfig, copies: int) -> int:
    """Attention keeps the input, the normalized pixels, query, key, value and the output."""
    attention = 7 if config.mid_block_add_attention else 0
    return area * max(4 * width, attention * width, _residual_width(width, width, copies))


def weight_bytes(config: VaeConfig, value_bytes: int) -> int:
    """Returns what the weights of both directions take; they are never quantized."""
    latent = config.latent_channels
    encoder = config.block_out_channels
    decoder = tuple(reversed(config.decoder_block_out_channels or encoder))
    values = _conv(config.in_channels, encoder[0]) + _conv(latent, decoder[0])
    values += _levels(encoder, config.layers_per_block) + _levels(decoder, config.layers_per_block + 1)
    values += sum(_middle_weights(width, config) for width in (encoder[-1], decoder[0]))
    values += 2 * encoder[-1] + _conv(encoder[-1], 2 * latent)
    values += 2 * decoder[-1] + _conv(decoder[-1], config.out_channels)
    values += _conv(2 * latent, 2 * latent, 1) if config.use_quant_conv else 0
    values += _conv(latent, latent, 1) if config.use_post_quant_conv else 0
    return (values + 2 * config.packed_channels) * value_bytes


def _levels(widths: tuple[int, ...], blocks: int) -> int:
    values = sum(_conv(width, width) for width in widths[:-1])
    for before, width in pairwise((widths[0], *widths)):
        values += _residual_weights(before, width) + (blocks - 1) * _residual_weights(width, width)
    return values


def _residual_weights(before: int, width: int) -> int:
    shortcut = _conv(before, width, 1) if before != width else 0
    return 2 * before + _conv(before, width) + 2 * width + _conv(width, width) + shortcut


def _middle_weights(width: int, config: VaeConfig) -> int:
    attention = 2 * width + 4 * (width * width + width) if config.mid_block_add_attention else 0
    return 2 * _residual_weights(width, width) + attention


def _conv(before: int, width: int, side: int = 3) -> int:
    return (before * side * side + 1) * width
