"""From a tensor's name in an adapter's file to the layer and the part of it that the tensor is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from klein_core.checkpoint.key_mapping import BFL, DIFFUSERS
from klein_core.checkpoint.key_maps import transformer_key_map
from klein_core.denoiser.transformer import FlowTransformer

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


_WEIGHT = ".weight"


class Place(NamedTuple):
    """Rows of one of our layers."""

    layer: str
    start: int
    stop: int
    first_row: int = 0
    """The named layer's own row that goes to `start`."""


@dataclass(frozen=True)
class LayerTarget:
    """What a file's layer name stands for."""

    inputs: int
    outputs: int
    places: tuple[Place, ...]


Layers = Mapping[str, LayerTarget]
"""Layer name without prefixes → what it stands for."""


def layer_targets(transformer: FlowTransformer) -> Layers:
    """Returns every layer name that an adapter of this model may use."""
    places: dict[str, list[Place]] = {}
    for name, place in _places(transformer):
        places.setdefault(name, []).append(place)
    layers = {
        name: LayerTarget(
            inputs=transformer.linears[found[0].layer].in_features,
            outputs=sum(place.stop - place.start for place in found),
            places=tuple(found),
        )
        for name, found in places.items()
    }
    return {name.replace(".", "_"): layer for name, layer in layers.items()} | layers


def _places(transformer: FlowTransformer) -> Iterator[tuple[str, Place]]:
    """Yields a layer name and where its rows are, or some of them."""
    named = {name for style in (DIFFUSERS, BFL) for name, _ in _of_style(transformer, style)}
    for style in (DIFFUSERS, BFL):
        yield from _of_style(transformer, style)
    for name, linear in transformer.linears.items():
        if name not in named:
            yield name, Place(name, 0, linear.out_features)
    yield from _partial_names(transformer)


def _of_style(transformer: FlowTransformer, style: str) -> Iterator[tuple[str, Place]]:
    """Yields the names that checkpoints of a style have for our layers; several may stack to one of them."""
    for parameter, pieces in transformer_key_map(transformer.config, style).items():
        layer, start = parameter.removesuffix(_WEIGHT), 0
        linear = transformer.linears.get(layer)
        if linear is None:
            continue
        for piece in pieces:
            share = linear.out_features // len(pieces)
            yield piece.name.removesuffix(_WEIGHT), Place(layer, start, start + share, piece.start)
            start += share


def _partial_names(transformer: FlowTransformer) -> Iterator[tuple[str, Place]]:
    """Yields names that only adapters use: trainers may adapt the attention's share of a projection alone."""
    for block in range(transformer.config.num_single_layers):
        layer = f"single_transformer_blocks.{block}.attn.to_qkv_mlp_proj"
        yield f"single_blocks.{block}.linear1_qkv", Place(layer, 0, 3 * transformer.config.hidden_size)
