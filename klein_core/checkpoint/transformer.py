"""How the flow transformer's parameters are named in each style of checkpoint. Torch-free.

Source: model facts 6.1, which is diffusers' conversion of the authors' file.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from klein_core.checkpoint.layouts import BFL
from klein_core.checkpoint.sources import Piece
from klein_core.variants import TransformerConfig

FUSED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "attn.to_added_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    }
)
"""Projection of a double-stream block → diffusers' projections that it stacks, in order."""

HEAD = "norm_out.linear.weight"
"""Rows scale, shift in diffusers' files and here; shift, scale in the authors' own."""

# Parameter (named as in diffusers, but for the fused ones) → its name in the authors' file.
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


def transformer_sources(config: TransformerConfig, style: str) -> dict[str, tuple[Piece, ...]]:
    """Returns every parameter of the network with the pieces that a checkpoint of this style has for it."""
    authors = _authors_names(config)
    if style != BFL:
        return {parameter: _diffusers_pieces(parameter) for parameter in authors}
    pieces = {parameter: (Piece(name),) for parameter, name in authors.items()}
    size = config.hidden_size
    head = authors[HEAD]
    return pieces | {HEAD: (Piece(head, size, 2 * size), Piece(head, 0, size))}


def _authors_names(config: TransformerConfig) -> dict[str, str]:
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in _WHOLE.items()}
    for kind, their_kind, count, table in (
        ("transformer_blocks", "double_blocks", config.num_layers, _DOUBLE),
        ("single_transformer_blocks", "single_blocks", config.num_single_layers, _SINGLE),
    ):
        for block in range(count):
            names |= {
                f"{kind}.{block}.{ours}": f"{their_kind}.{block}.{theirs}" for ours, theirs in table.items()
            }
    return names


def _diffusers_pieces(parameter: str) -> tuple[Piece, ...]:
    for fused, parts in FUSED.items():
        if parameter.endswith(f".{fused}.weight"):
            block = parameter.removesuffix(f"{fused}.weight")
            return tuple(Piece(f"{block}{part}.weight") for part in parts)
    return (Piece(parameter),)
