"""Naming of a checkpoint's tensors, recognized by the names alone and never by the file's. Torch-free."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from klein_core.checkpoint.files import Checkpoint
from klein_core.errors import CheckpointError, listed
from klein_core.model_registry import FLUX_3, family_of_header, other_family

TEXT_ENCODER = "text_encoder"
TRANSFORMER = "transformer"
VAE = "vae"
DIFFUSERS = "diffusers"
BFL = "bfl"
TRANSFORMERS = "transformers"

# Names that only one style of one component has, after the prefixes that tools add.
_MARKS: Mapping[str, Mapping[str, re.Pattern[str]]] = MappingProxyType(
    {
        TRANSFORMER: {
            DIFFUSERS: re.compile(
                r"(?P<prefix>((model\.)?diffusion_model\.|transformer\.)?)"
                r"(transformer_blocks|single_transformer_blocks|x_embedder|context_embedder|"
                r"time_guidance_embed|norm_out|proj_out)\."
            ),
            BFL: re.compile(
                r"(?P<prefix>((model\.)?diffusion_model\.|transformer\.)?)"
                r"(double_blocks|single_blocks|img_in|txt_in|time_in|final_layer)\."
            ),
        },
        VAE: {
            DIFFUSERS: re.compile(
                r"(?P<prefix>(first_stage_model\.|vae\.)?)"
                r"((encoder|decoder)\.(down_blocks|up_blocks|mid_block|conv_norm_out)|(post_)?quant_conv)\."
            ),
            BFL: re.compile(
                r"(?P<prefix>(first_stage_model\.|vae\.)?)"
                r"(encoder|decoder)\.(down|up|mid|norm_out|quant_conv|post_quant_conv)\."
            ),
        },
        TEXT_ENCODER: {
            TRANSFORMERS: re.compile(
                r"(?P<prefix>(text_encoders\.\w+\.(transformer\.)?|text_encoder\.)?(model\.)?)"
                r"(layers\.\d+|embed_tokens)\."
            )
        },
    }
)
_PART = re.compile(
    r"((model\.)?diffusion_model|transformer|first_stage_model|vae|text_encoders?|cond_stage_model|conditioner)\."
)


class TensorSlice(NamedTuple):
    """Rows of one stored tensor."""

    name: str
    """The tensor's name in the checkpoint, prefix included."""
    start: int = 0
    stop: int | None = None
    """Rows start … stop, exclusive; `None` is the tensor's end."""
    is_pointwise: bool = False
    """Whether it is stored as a 1×1 convolution (rows, columns, 1, 1) and needed as a matrix (rows, columns)."""

    def row_range(self, row_count: int) -> range:
        """Returns the indices of these rows in a tensor of `row_count` rows."""
        return range(row_count)[self.start : self.stop]

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of these rows of a tensor of shape `stored`, as the parameter needs them."""
        if self.is_pointwise and len(stored) == 4 and stored[2:] == (1, 1):
            stored = stored[:2]
        is_whole = self.start == 0 and self.stop is None
        return stored if is_whole or not stored else (len(self.row_range(stored[0])), *stored[1:])


KeyMap = Mapping[str, tuple[TensorSlice, ...]]
"""Parameter name → the slices that make it, one below the other."""


@dataclass(frozen=True)
class Layout:
    """A style of tensor names, and the prefix of each name."""

    component: str
    """`transformer`, `vae` or `text_encoder`."""
    style: str
    """`diffusers`, `bfl` (the authors' own single files) or `transformers` (of text encoders)."""
    prefix: str = ""
    """`model.diffusion_model.` and the like; empty in most files."""

    def owns(self, name: str) -> bool:
        """Whether a stored tensor may belong to this component; a file can hold several, each with its prefix."""
        return not self.prefix or name.startswith(self.prefix) or not _PART.match(name)

    def prefixed(self, key_map: KeyMap) -> dict[str, tuple[TensorSlice, ...]]:
        """Returns a key map whose slices have the names of the checkpoint, prefix included."""
        return {
            target: tuple(each._replace(name=self.prefix + each.name) for each in slices)
            for target, slices in key_map.items()
        }


def find_layout(component: str, checkpoint: Checkpoint) -> Layout:
    """Returns the layout of most of the tensors that may belong to one component.

    Raises:
        CheckpointError: no tensor belongs to this component; the message names what the file holds instead. Or its
            header has the name of another family of models.
    """
    refuse_other_family_header(checkpoint)
    layout = _layout_among(component, checkpoint.files)
    if layout is not None:
        return layout
    raise_if_named_otherwise(checkpoint)
    others = components_among(checkpoint.files)
    found = f"it holds a {' and a '.join(others)}" if others else f"it holds {listed(checkpoint.files)}"
    raise CheckpointError(f"{checkpoint.path} has no tensor of a klein {component}: {found}")


def refuse_other_family_header(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError when a header entry of a single file has the name of FLUX.3.

    Older families are only named where a file has no layout: tools write such entries into files of [klein] as well.
    """
    family = family_of_header(checkpoint.own_metadata)
    if family is not None and FLUX_3 in family:
        raise CheckpointError(f"{checkpoint.path}: {family}")


def raise_if_named_otherwise(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError when the header or the path of a file without a layout has another family's name."""
    family = family_of_header(checkpoint.own_metadata)
    named = other_family(checkpoint.path.name)
    if family is None and named is not None:
        family = f"by its name this is {named}"
    if family is not None:
        raise CheckpointError(f"{checkpoint.path}: {family}")


def _layout_among(component: str, names: Iterable[str]) -> Layout | None:
    """Returns the layout of one component's tensors among `names`; `None` when there are none."""
    names = list(names)
    counts = Counter(
        (style, match["prefix"])
        for style, mark in _MARKS[component].items()
        for name in names
        if (match := mark.match(name))
    )
    if not counts:
        return None
    style, prefix = counts.most_common(1)[0][0]
    return Layout(component, style, prefix)


def components_among(names: Iterable[str]) -> list[str]:
    """Returns the components to which at least one of the names belongs."""
    names = list(names)
    return [component for component in _MARKS if _layout_among(component, names)]
