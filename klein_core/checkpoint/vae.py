"""How the autoencoder's parameters are named in each style of checkpoint. Torch-free.

Source: model facts 5.4 and 6.2. Parameters are named as in diffusers' files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from klein_core.checkpoint.layouts import BFL
from klein_core.checkpoint.sources import Piece
from klein_core.variants import VaeConfig

STATISTICS = ("bn.running_mean", "bn.running_var")
_BATCH_COUNT = "bn.num_batches_tracked"
_RESIDUAL = ("norm1", "conv1", "norm2", "conv2")
_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def vae_sources(config: VaeConfig, style: str) -> dict[str, tuple[Piece, ...]]:
    """Returns every parameter and needed buffer with the piece that a checkpoint of this style has for it."""
    names = [f"{module}.{kind}" for module in _modules(config) for kind in ("weight", "bias")]
    if style != BFL:
        return {name: (Piece(name),) for name in (*names, *STATISTICS)}
    last_level = len(config.block_out_channels) - 1
    return {name: (_authors_piece(name, last_level),) for name in (*names, *STATISTICS)}


def is_unneeded(name: str) -> bool:
    """Whether a stored tensor only counts training's batches."""
    return name == _BATCH_COUNT or name.endswith("." + _BATCH_COUNT)


def _modules(config: VaeConfig) -> Iterator[str]:
    """Yields the path of every module that has weights, all of which have biases too."""
    widths = config.block_out_channels
    yield from _half("encoder", "down", widths, config.layers_per_block, config)
    widths = tuple(reversed(config.decoder_block_out_channels or widths))
    yield from _half("decoder", "up", widths, config.layers_per_block + 1, config)
    if config.use_quant_conv:
        yield "quant_conv"
    if config.use_post_quant_conv:
        yield "post_quant_conv"


def _half(
    half: str, direction: str, widths: Sequence[int], layer_count: int, config: VaeConfig
) -> Iterator[str]:
    """Yields one direction's modules; `widths` in the order in which features pass them."""
    yield f"{half}.conv_in"
    before = widths[0]
    for level, width in enumerate(widths):
        path = f"{half}.{direction}_blocks.{level}"
        for layer, (inner, outer) in enumerate(pairwise([before] + [width] * layer_count)):
            yield from (f"{path}.resnets.{layer}.{part}" for part in _RESIDUAL)
            if inner != outer:
                yield f"{path}.resnets.{layer}.conv_shortcut"
        if level + 1 < len(widths):
            yield f"{path}.{direction}samplers.0.conv"
        before = width
    yield from (f"{half}.mid_block.resnets.{index}.{part}" for index in range(2) for part in _RESIDUAL)
    if config.mid_block_add_attention:
        yield from (f"{half}.mid_block.attentions.0.{part}" for part in _ATTENTION)
    yield from (f"{half}.conv_norm_out", f"{half}.conv_out")


def _authors_piece(name: str, last_level: int) -> Piece:
    module, _, kind = name.rpartition(".")
    attention = re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)", module)
    if attention:
        part = _ATTENTION[attention[2]]
        # The authors' projections are 1×1 convolutions.
        is_pointwise = kind == "weight" and part != "norm"
        return Piece(f"{attention[1]}.mid.attn_1.{part}.{kind}", is_pointwise=is_pointwise)
    return Piece(f"{_authors_module(module, last_level)}.{kind}")


def _authors_module(module: str, last_level: int) -> str:
    """Renames one module; the decoder's levels are counted from the other end."""
    if module in ("quant_conv", "post_quant_conv"):
        return f"{'encoder' if module == 'quant_conv' else 'decoder'}.{module}"
    module = module.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    module = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", module)
    module = re.sub(r"down_blocks\.(\d+)", r"down.\1", module)
    module = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last_level - int(found[1])}", module)
    module = module.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    return module.replace(".resnets.", ".block.")
