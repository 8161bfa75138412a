"""How a checkpoint names its tensors, told by the names themselves and never by the file's. Torch-free."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from klein_core.checkpoint.files import Checkpoint
from klein_core.errors import CheckpointError, listed

TEXT_ENCODER = "text_encoder"
TRANSFORMER = "transformer"
VAE = "vae"
DIFFUSERS = "diffusers"
BFL = "bfl"
TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class Layout:
    """A style of names and what stands before each of them."""

    component: str
    """`transformer`, `vae` or `text_encoder`."""
    style: str
    """`diffusers`, `bfl` (the authors' own single files) or `transformers` (of text encoders)."""
    prefix: str = ""
    """`model.diffusion_model.` and the like; empty in most files."""

    def owns(self, name: str) -> bool:
        """Whether a stored tensor can be this component's: a file may hold a whole model, each part prefixed."""
        return not self.prefix or name.startswith(self.prefix) or not _PART.match(name)

    def prefixed(self, sources: KeyMap) -> dict[str, tuple[TensorSlice, ...]]:
        """Returns sources whose pieces have the names that the checkpoint gives them."""
        return {
            target: tuple(piece._replace(name=self.prefix + piece.name) for piece in pieces)
            for target, pieces in sources.items()
        }


# Names that only one style of one component has, after the prefixes that tools put before them.
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


def find_layout(component: str, checkpoint: Checkpoint) -> Layout:
    """Tells how a checkpoint names one component's tensors: as most of those that can be its are named.

    Raises:
        CheckpointError: none of the names is of this component; the message says what the file is instead.
    """
    layout = layout_among(component, checkpoint.files)
    if layout is not None:
        return layout
    others = components_among(checkpoint.files)
    found = f"it holds a {' and a '.join(others)}" if others else f"it holds {listed(checkpoint.files)}"
    raise CheckpointError(f"{checkpoint.path} has no tensor of a klein {component}: {found}")


def layout_among(component: str, names: Iterable[str]) -> Layout | None:
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
    """Returns the components that at least one of the names is of."""
    names = list(names)
    return [component for component in _MARKS if layout_among(component, names)]


class TensorSlice(NamedTuple):
    """Rows of one stored tensor."""

    name: str
    """The tensor's name in the checkpoint, prefix included."""
    start: int = 0
    stop: int | None = None
    """Rows from `start` up to but not with `stop`; `None` is the tensor's end."""
    is_pointwise: bool = False
    """Whether it is stored as a 1×1 convolution (rows, columns, 1, 1) and needed as a matrix (rows, columns)."""

    def row_range(self, row_count: int) -> range:
        """Returns its rows of a tensor that has `row_count` of them."""
        return range(row_count)[self.start : self.stop]

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of these rows of a tensor of shape `stored`, as the parameter needs them."""
        if self.is_pointwise and len(stored) == 4 and stored[2:] == (1, 1):
            stored = stored[:2]
        is_whole = self.start == 0 and self.stop is None
        return stored if is_whole or not stored else (len(self.row_range(stored[0])), *stored[1:])


KeyMap = Mapping[str, tuple[TensorSlice, ...]]
"""Parameter name → the pieces that make it, in order; each parameter is on its own."""
