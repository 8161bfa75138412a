"""Key mapping: from a tensor's name in an adapter file to our layer and the tensor's role in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from klein_core.checkpoint.key_mapping import BFL, DIFFUSERS
from klein_core.checkpoint.key_maps import transformer_key_map
from klein_core.denoiser.transformer import FlowTransformer

DOTTED_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
"""Prefixes of names with dots, in the order in which they may follow each other."""
UNDERSCORED_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
"""Prefixes of names with underscores."""
_TEXT_ENCODER = re.compile(
    r"(base_model\.model\.)?(text_encoder|text_model|lora_te|conditioner\.|cond_stage_model\.|model\.layers\.)"
)
_LORA_ROLES = {"A": "down", "down": "down", "B": "up", "up": "up"}
_LORA = re.compile(r"(.+?)\.lora[._](A|B|down|up)(?:\.[A-Za-z0-9_-]+)?\.weight")
"""PEFT may insert the adapter's name before `weight`."""
_OTHER = re.compile(
    r"(.+)\.(alpha|lokr_w1|lokr_w1_a|lokr_w1_b|lokr_w2|lokr_w2_a|lokr_w2_b"
    r"|hada_w1_a|hada_w1_b|hada_w2_a|hada_w2_b)"
)
_DORA = re.compile(r".+\.(dora_scale|lora_magnitude_vector)(\..+)?")
_WEIGHT = ".weight"


class TensorName(NamedTuple):
    """A parsed tensor name."""

    layer: str
    """The layer's name as the file writes it, without prefixes."""
    role: str
    """down, up, alpha, or LyCORIS' name of a factor."""


class RowRange(NamedTuple):
    """Output rows of one of our layers, for a named layer or a part of it."""

    layer: str
    start: int
    stop: int
    first_row: int = 0
    """The named layer's row that goes to `start`."""


@dataclass(frozen=True)
class LayerTarget:
    """Shape and row ranges of a layer name that adapter files may use."""

    inputs: int
    outputs: int
    row_ranges: tuple[RowRange, ...]


Layers = Mapping[str, LayerTarget]
"""Layer name without prefixes → its target."""


def parse_tensor_name(name: str) -> TensorName | None:
    """Splits a tensor's name into layer and role; returns `None` if the role is unknown."""
    if match := _LORA.fullmatch(name):
        return TensorName(without_prefix(match[1]), _LORA_ROLES[match[2]])
    if match := _OTHER.fullmatch(name):
        return TensorName(without_prefix(match[1]), match[2])
    return None


def is_text_encoder(name: str) -> bool:
    """Returns whether a tensor belongs to an adapter of a text encoder."""
    return _TEXT_ENCODER.match(name) is not None


def is_dora(name: str) -> bool:
    """Returns whether a tensor is a DoRA magnitude, which needs the merged weight."""
    return _DORA.fullmatch(name) is not None


def without_prefix(layer: str) -> str:
    """Removes training tools' prefixes from a layer's name."""
    for prefix in DOTTED_PREFIXES:
        layer = layer.removeprefix(prefix)
    for prefix in UNDERSCORED_PREFIXES:
        if layer.startswith(prefix):
            return layer.removeprefix(prefix)
    return layer


def layer_targets(transformer: FlowTransformer) -> Layers:
    """Returns every layer name that an adapter of this model may use, with dots and with underscores."""
    row_ranges: dict[str, list[RowRange]] = {}
    for name, row_range in _named_row_ranges(transformer):
        row_ranges.setdefault(name, []).append(row_range)
    targets = {
        name: LayerTarget(
            inputs=transformer.linears[found[0].layer].in_features,
            outputs=sum(row_range.stop - row_range.start for row_range in found),
            row_ranges=tuple(found),
        )
        for name, found in row_ranges.items()
    }
    return {name.replace(".", "_"): target for name, target in targets.items()} | targets


def _named_row_ranges(transformer: FlowTransformer) -> Iterator[tuple[str, RowRange]]:
    """Yields layer names with their rows, or some of them, in our layers."""
    named = set()
    for style in (DIFFUSERS, BFL):
        for name, row_range in _checkpoint_row_ranges(transformer, style):
            named.add(name)
            yield name, row_range
    for name, linear in transformer.linears.items():
        if name not in named:
            yield name, RowRange(name, 0, linear.out_features)
    # Only adapters use these names: training tools may adapt the attention's rows of a fused projection alone.
    for block in range(transformer.config.num_single_layers):
        layer = f"single_transformer_blocks.{block}.attn.to_qkv_mlp_proj"
        yield f"single_blocks.{block}.linear1_qkv", RowRange(layer, 0, 3 * transformer.config.hidden_size)


def _checkpoint_row_ranges(transformer: FlowTransformer, style: str) -> Iterator[tuple[str, RowRange]]:
    """Yields the names that checkpoints of a style use; several may be stacked in one of our layers."""
    for parameter, pieces in transformer_key_map(transformer.config, style).items():
        layer, start = parameter.removesuffix(_WEIGHT), 0
        linear = transformer.linears.get(layer)
        if linear is None:
            continue
        for piece in pieces:
            rows = linear.out_features // len(pieces)
            yield piece.name.removesuffix(_WEIGHT), RowRange(layer, start, start + rows, piece.start)
            start += rows
