"""What a `transformer/` folder holds: its configuration and the names of its tensors."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from klein_core.errors import CheckpointError
from klein_core.variants import TransformerConfig, read_json

FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
"""Projection of a double-stream block → the checkpoint's projections that it stacks, in order."""


def read_config(folder: Path) -> TransformerConfig:
    """Reads `config.json`; values that it leaves out are klein's.

    Raises:
        CheckpointError: the file is missing, lacks a size, or describes a network of another kind.
    """
    values = read_json(folder / "config.json")
    unlike = [f"{name} is {values[name]!r}" for name, plain in _PLAIN.items() if values.get(name, plain) != plain]
    if values.get("out_channels") not in (None, values.get("in_channels", TransformerConfig.in_channels)):
        unlike.append(f"out_channels is {values['out_channels']!r}")
    if unlike:
        raise CheckpointError(f"{folder}/config.json is not a klein transformer's: {', '.join(unlike)}")
    known = {field.name for field in fields(TransformerConfig)}
    chosen = {name: value for name, value in values.items() if name in known and value is not None}
    chosen["axes_dims_rope"] = tuple(chosen.get("axes_dims_rope", TransformerConfig.axes_dims_rope))
    try:
        config = TransformerConfig(**chosen)
    except TypeError as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from None
    if sum(config.axes_dims_rope) != config.attention_head_dim:
        raise CheckpointError(
            f"{folder}/config.json: axes_dims_rope {config.axes_dims_rope} must add up to "
            f"attention_head_dim {config.attention_head_dim}"
        )
    return config


def checkpoint_names(config: TransformerConfig) -> dict[str, tuple[str, ...]]:
    """Returns parameter → diffusers' names, for the parameters that fuse several."""
    return {
        f"transformer_blocks.{block}.attn.{fused}.weight": tuple(
            f"transformer_blocks.{block}.attn.{part}.weight" for part in parts
        )
        for block in range(config.num_layers)
        for fused, parts in FUSED.items()
    }


_PLAIN = {"guidance_embeds": False, "patch_size": 1}
"""What every klein has and this network takes for granted."""
