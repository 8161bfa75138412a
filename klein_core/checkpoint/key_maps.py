"""Key maps: the names of each component's parameters in each style of checkpoint. Torch-free.

Parameters are named as in diffusers, except for fused ones. Source: diffusers' conversions of the authors' files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType

from klein_core.checkpoint.key_mapping import BFL, DIFFUSERS, TensorSlice
from klein_core.variants import TextEncoderConfig, TransformerConfig, VaeConfig

FUSED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "attn.to_added_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    }
)
"""Fused projection of a double-stream block → diffusers' projections that it stacks, in order."""

HEAD = "norm_out.linear.weight"
"""Rows scale, shift in diffusers' files and here; shift, scale in the authors' own."""

# Module or parameter → its name in the authors' file.
_WHOLE = {
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_DOUBLE = {
    "attn.to_qkv.weight": "img_attn.qkv.weight",
    "attn.to_added_qkv.weight": "txt_attn.qkv.weight",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_out.0.weight": "img_attn.proj.weight",
    "attn.to_add_out.weight": "txt_attn.proj.weight",
    "ff.linear_in.weight": "img_mlp.0.weight",
    "ff.linear_out.weight": "img_mlp.2.weight",
    "ff_context.linear_in.weight": "txt_mlp.0.weight",
    "ff_context.linear_out.weight": "txt_mlp.2.weight",
}
_SINGLE = {
    "attn.to_qkv_mlp_proj.weight": "linear1.weight",
    "attn.to_out.weight": "linear2.weight",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
}

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


def transformer_key_map(config: TransformerConfig, style: str) -> dict[str, tuple[TensorSlice, ...]]:
    """Returns every parameter of the transformer with the slices that make it in this style, without any prefix."""
    authors = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in _WHOLE.items()}
    for kind, their_kind, count, table in (
        ("transformer_blocks", "double_blocks", config.num_layers, _DOUBLE),
        ("single_transformer_blocks", "single_blocks", config.num_single_layers, _SINGLE),
    ):
        for block in range(count):
            for ours, theirs in table.items():
                authors[f"{kind}.{block}.{ours}"] = f"{their_kind}.{block}.{theirs}"
    slices: dict[str, tuple[TensorSlice, ...]]
    if style != BFL:
        slices = {parameter: (TensorSlice(parameter),) for parameter in authors}
        for block in range(config.num_layers):
            for fused, parts in FUSED.items():
                path = f"transformer_blocks.{block}"
                slices[f"{path}.{fused}.weight"] = tuple(
                    TensorSlice(f"{path}.{part}.weight") for part in parts
                )
        return slices
    slices = {parameter: (TensorSlice(name),) for parameter, name in authors.items()}
    size = config.hidden_size
    head = authors[HEAD]
    return slices | {HEAD: (TensorSlice(head, size, 2 * size), TensorSlice(head, 0, size))}


def checkpoint_names(config: TransformerConfig) -> dict[str, tuple[str, ...]]:
    """Returns fused parameter → diffusers' names of its parts; the other parameters have the same name there."""
    return {
        parameter: tuple(each.name for each in slices)
        for parameter, slices in transformer_key_map(config, DIFFUSERS).items()
        if len(slices) > 1
    }


def vae_key_map(config: VaeConfig, style: str) -> dict[str, tuple[TensorSlice, ...]]:
    """Returns every parameter and needed buffer of the autoencoder with its slice in this style, without any prefix."""
    widths = config.block_out_channels
    decoder_widths = tuple(reversed(config.decoder_block_out_channels or widths))
    modules = [
        *_half("encoder", "down", widths, config.layers_per_block, config),
        *_half("decoder", "up", decoder_widths, config.layers_per_block + 1, config),
        *(["quant_conv"] if config.use_quant_conv else []),
        *(["post_quant_conv"] if config.use_post_quant_conv else []),
    ]
    names = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    if style != BFL:
        return {name: (TensorSlice(name),) for name in (*names, *STATISTICS)}
    last_level = len(config.block_out_channels) - 1
    return {name: (_authors_slice(name, last_level),) for name in (*names, *STATISTICS)}


def is_unneeded(name: str) -> bool:
    """Whether a stored tensor only counts the batches of training."""
    return name == _BATCH_COUNT or name.endswith("." + _BATCH_COUNT)


def _half(
    half: str, direction: str, widths: Sequence[int], layer_count: int, config: VaeConfig
) -> Iterator[str]:
    """Yields the modules of encoder or decoder; `widths` in the order of computation."""
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


def _authors_slice(name: str, last_level: int) -> TensorSlice:
    """Returns the authors' slice of a parameter; they count the decoder's levels from the other end."""
    module, _, kind = name.rpartition(".")
    attention = re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)", module)
    if attention:
        part = _ATTENTION[attention[2]]
        # The authors' projections are 1×1 convolutions.
        is_pointwise = kind == "weight" and part != "norm"
        return TensorSlice(f"{attention[1]}.mid.attn_1.{part}.{kind}", is_pointwise=is_pointwise)
    if module in ("quant_conv", "post_quant_conv"):
        return TensorSlice(f"{'encoder' if module == 'quant_conv' else 'decoder'}.{module}.{kind}")
    module = module.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    module = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", module)
    module = re.sub(r"down_blocks\.(\d+)", r"down.\1", module)
    module = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last_level - int(found[1])}", module)
    module = module.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    return TensorSlice(f"{module.replace('.resnets.', '.block.')}.{kind}")


def text_encoder_key_map(config: TextEncoderConfig) -> dict[str, tuple[TensorSlice, ...]]:
    """Returns every parameter up to the last tapped layer with its slice, without any prefix."""
    layers = range(max(config.tapped_layers))
    names = [EMBEDDING, *(f"layers.{layer}.{part}.weight" for layer in layers for part in _LAYER)]
    return {name: (TensorSlice(name),) for name in names}


def is_past(config: TextEncoderConfig) -> Callable[[str], bool]:
    """Returns a predicate for stored tensors that are not needed: those after the last tapped layer."""
    layer_count = max(config.tapped_layers)

    def past(name: str) -> bool:
        layer = _LAYER_NUMBER.match(name)
        return bool(_UNNEEDED.match(name)) or (layer is not None and int(layer[1]) >= layer_count)

    return past
