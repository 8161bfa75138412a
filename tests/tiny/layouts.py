"""Renames diffusers' tensors as other tools name them, from the formats' descriptions; shares no loader code."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def bfl_transformer(diffusers: Mapping[str, Tensor]) -> Tensors:
    """Returns the authors' single file of a transformer: fused qkv, final layer's halves the other way round."""
    left, out = dict(diffusers), {}
    out["img_in.weight"] = left.pop("x_embedder.weight")
    out["txt_in.weight"] = left.pop("context_embedder.weight")
    out["time_in.in_layer.weight"] = left.pop("time_guidance_embed.timestep_embedder.linear_1.weight")
    out["time_in.out_layer.weight"] = left.pop("time_guidance_embed.timestep_embedder.linear_2.weight")
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        out[f"{name}.lin.weight"] = left.pop(f"{name}.linear.weight")
    scale, shift = left.pop("norm_out.linear.weight").chunk(2)
    out["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    out["final_layer.linear.weight"] = left.pop("proj_out.weight")
    for block in range(_count(left, "transformer_blocks")):
        _double_block(left, out, f"transformer_blocks.{block}.", f"double_blocks.{block}.")
    for block in range(_count(left, "single_transformer_blocks")):
        ours, theirs = f"single_transformer_blocks.{block}.attn.", f"single_blocks.{block}."
        out[theirs + "linear1.weight"] = left.pop(ours + "to_qkv_mlp_proj.weight")
        out[theirs + "linear2.weight"] = left.pop(ours + "to_out.weight")
        out[theirs + "norm.query_norm.scale"] = left.pop(ours + "norm_q.weight")
        out[theirs + "norm.key_norm.scale"] = left.pop(ours + "norm_k.weight")
    assert not left, left.keys()
    return out


def _double_block(left: Tensors, out: Tensors, ours: str, theirs: str) -> None:
    for stream, projections, norm, proj, mlp in (
        ("img", ("to_q", "to_k", "to_v"), "norm_", "to_out.0", "ff"),
        ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "norm_added_", "to_add_out", "ff_context"),
    ):
        qkv = [left.pop(f"{ours}attn.{name}.weight") for name in projections]
        out[f"{theirs}{stream}_attn.qkv.weight"] = torch.cat(qkv)
        out[f"{theirs}{stream}_attn.norm.query_norm.scale"] = left.pop(f"{ours}attn.{norm}q.weight")
        out[f"{theirs}{stream}_attn.norm.key_norm.scale"] = left.pop(f"{ours}attn.{norm}k.weight")
        out[f"{theirs}{stream}_attn.proj.weight"] = left.pop(f"{ours}attn.{proj}.weight")
        out[f"{theirs}{stream}_mlp.0.weight"] = left.pop(f"{ours}{mlp}.linear_in.weight")
        out[f"{theirs}{stream}_mlp.2.weight"] = left.pop(f"{ours}{mlp}.linear_out.weight")


def bfl_vae(diffusers: Mapping[str, Tensor]) -> Tensors:
    """Returns the authors' file of an autoencoder: levels counted as the network has them, 1×1 convolutions."""
    levels = _count(diffusers, "decoder.up_blocks")
    out = {}
    for name, tensor in diffusers.items():
        theirs, is_matrix = _vae_name(name, levels)
        out[theirs] = tensor[:, :, None, None] if is_matrix else tensor
    assert len(out) == len(diffusers)
    return out


def _vae_name(name: str, levels: int) -> tuple[str, bool]:
    parts = name.split(".")
    match parts:
        case [("encoder" | "decoder") as half, "mid_block", "attentions", "0", module, *rest]:
            theirs = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}[
                module
            ]
            return f"{half}.mid.attn_1.{theirs}.{rest[-1]}", module != "group_norm" and rest[-1] == "weight"
        case [("encoder" | "decoder") as half, "mid_block", "resnets", index, *rest]:
            return ".".join([half, "mid", f"block_{int(index) + 1}", *rest]), False
        case ["encoder", "down_blocks", level, "resnets", index, *rest]:
            return ".".join(["encoder.down", level, "block", index, *_shortcut(rest)]), False
        case ["encoder", "down_blocks", level, "downsamplers", "0", "conv", kind]:
            return f"encoder.down.{level}.downsample.conv.{kind}", False
        case ["decoder", "up_blocks", level, "resnets", index, *rest]:
            return ".".join(
                ["decoder.up", str(levels - 1 - int(level)), "block", index, *_shortcut(rest)]
            ), False
        case ["decoder", "up_blocks", level, "upsamplers", "0", "conv", kind]:
            return f"decoder.up.{levels - 1 - int(level)}.upsample.conv.{kind}", False
        case [("encoder" | "decoder") as half, "conv_norm_out", kind]:
            return f"{half}.norm_out.{kind}", False
        case ["quant_conv", kind]:
            return f"encoder.quant_conv.{kind}", False
        case ["post_quant_conv", kind]:
            return f"decoder.post_quant_conv.{kind}", False
    return name, False


def _shortcut(rest: list[str]) -> list[str]:
    return ["nin_shortcut" if part == "conv_shortcut" else part for part in rest]


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    """Returns tensors as tools name them that keep several parts in one file."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def bare_text_encoder(transformers: Mapping[str, Tensor], *, lm_head: bool) -> Tensors:
    """Returns a text encoder's tensors without their `model.` prefix, with or without the language head."""
    bare = {name.removeprefix("model."): tensor for name, tensor in transformers.items()}
    return {name: tensor for name, tensor in bare.items() if lm_head or not name.startswith("lm_head")}


def _count(tensors: Mapping[str, Tensor], blocks: str) -> int:
    found = [re.match(re.escape(blocks) + r"\.(\d+)\.", name) for name in tensors]
    return 1 + max(int(match[1]) for match in found if match)
