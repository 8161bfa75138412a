"""Which layers adapters can name, in every naming there is, and which rows of ours each of them is.

Files name layers as diffusers does, as the authors' own checkpoint does or as this library does (diffusers' names,
queries, keys and values of a double-stream block being one layer); with dots or with underscores throughout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from klein_core.checkpoint.layouts import BFL, DIFFUSERS
from klein_core.checkpoint.transformer import transformer_sources
from klein_core.denoiser.transformer import FlowTransformer

_WEIGHT = ".weight"


class Place(NamedTuple):
    """Rows of one of our layers."""

    layer: str
    start: int
    stop: int
    first_row: int = 0
    """The named layer's own row that goes to `start`."""


@dataclass(frozen=True)
class NamedLayer:
    """What a file's layer name stands for."""

    inputs: int
    outputs: int
    places: tuple[Place, ...]


Layers = Mapping[str, NamedLayer]
"""Layer name without prefixes → what it stands for."""


def named_layers(transformer: FlowTransformer) -> Layers:
    """Returns every layer name that an adapter of this model may use."""
    places: dict[str, list[Place]] = {}
    for name, place in _places(transformer):
        places.setdefault(name, []).append(place)
    layers = {
        name: NamedLayer(
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
    for parameter, pieces in transformer_sources(transformer.config, style).items():
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
