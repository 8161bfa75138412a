"""How the parameters of this network relate to the names in a `transformer/` folder."""

from __future__ import annotations

from klein_core.variants import TransformerConfig

FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""Projection of a double-stream block → the checkpoint's projections that it stacks, in order."""


def checkpoint_names(config: TransformerConfig) -> dict[str, tuple[str, ...]]:
    """Returns parameter → diffusers' names, for parameters that fuse several; the others are named alike."""
    return {
        f"transformer_blocks.{block}.attn.{fused}.weight": tuple(
            f"transformer_blocks.{block}.attn.{part}.weight" for part in parts
        )
        for block in range(config.num_layers)
        for fused, parts in FUSED.items()
    }
