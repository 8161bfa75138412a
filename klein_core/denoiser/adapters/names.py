"""From a tensor's name in an adapter's file to the layer and the part of it that the tensor is."""

from __future__ import annotations

import re
from typing import NamedTuple

DOTTED_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
"""Before names with dots, in the order in which they may follow each other."""
UNDERSCORED_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
"""Before names with underscores."""
_TEXT_ENCODER = re.compile(
    r"(base_model\.model\.)?(text_encoder|text_model|lora_te|conditioner\.|cond_stage_model\.|model\.layers\.)"
)
_LORA_PARTS = {"A": "down", "down": "down", "B": "up", "up": "up"}
_LORA = re.compile(r"(.+?)\.lora[._](A|B|down|up)(?:\.[A-Za-z0-9_-]+)?\.weight")
"""A name may stand before `weight`: that which PEFT gave the adapter in memory."""
_OTHER = re.compile(
    r"(.+)\.(alpha|lokr_w1|lokr_w1_a|lokr_w1_b|lokr_w2|lokr_w2_a|lokr_w2_b"
    r"|hada_w1_a|hada_w1_b|hada_w2_a|hada_w2_b)"
)
_DORA = re.compile(r".+\.(dora_scale|lora_magnitude_vector)(\..+)?")


class Part(NamedTuple):
    """A tensor's place in its layer."""

    layer: str
    """The layer's name without prefixes, as the file writes it."""
    role: str
    """down, up, alpha, or LyCORIS' own name of a factor."""


def is_of_text_encoder(name: str) -> bool:
    """Returns whether a tensor belongs to an adapter of a text encoder."""
    return _TEXT_ENCODER.match(name) is not None


def is_of_dora(name: str) -> bool:
    """Returns whether a tensor is a DoRA magnitude, which an unmerged adapter cannot have."""
    return _DORA.fullmatch(name) is not None


def part_of(name: str) -> Part | None:
    """Takes a tensor's name apart; `None` when it does not end as any known part does."""
    if match := _LORA.fullmatch(name):
        return Part(without_prefix(match[1]), _LORA_PARTS[match[2]])
    if match := _OTHER.fullmatch(name):
        return Part(without_prefix(match[1]), match[2])
    return None


def without_prefix(layer: str) -> str:
    """Removes what training tools put before a layer's name."""
    for prefix in DOTTED_PREFIXES:
        layer = layer.removeprefix(prefix)
    for prefix in UNDERSCORED_PREFIXES:
        if layer.startswith(prefix):
            return layer.removeprefix(prefix)
    return layer
