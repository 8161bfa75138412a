"""How a checkpoint names its tensors, told by the names themselves and never by the file's. Torch-free."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from klein_core.checkpoint.files import Checkpoint
from klein_core.errors import CheckpointError, listed, raise_if_problems

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
    raise CheckpointError(f"{checkpoint.place} has no tensor of a klein {component}: {found}")


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


KeyMap = Mapping[str, tuple[TensorSlice, ...]]
"""Parameter name → the pieces that make it, in order; each parameter is on its own."""

NO_SOURCES: KeyMap = MappingProxyType({})

COMPANION_SUFFIXES = (
    ".weight_scale",
    ".weight_scale_2",
    ".input_scale",
    ".pre_quant_scale",
    ".comfy_quant",
)
"""What quantized files store beside `X.weight`: `X` and one of these. They describe it and are no parameters."""


def companions_of(name: str) -> dict[str, str]:
    """Returns suffix → the name that a quantized tensor `X.weight` would have a companion under."""
    base = name.removesuffix(".weight")
    return {suffix: base + suffix for suffix in COMPANION_SUFFIXES}


def is_companion(name: str) -> bool:
    """Whether a stored tensor only describes another one."""
    return name.endswith(COMPANION_SUFFIXES)


@dataclass(frozen=True)
class Match:
    """Which tensors make which parameters, and what does not fit; names as the checkpoint has them."""

    plan: Mapping[str, tuple[TensorSlice, ...]]
    """Parameter → the pieces that make it."""
    missing: tuple[str, ...]
    half: tuple[str, ...]
    """Parameters of which only some pieces are there, each with both lists."""
    extra: tuple[str, ...]
    """Tensors that no parameter needs and nothing explains."""

    def raise_if_problems(self, place: Path) -> None:
        """Raises CheckpointError with every name that does not fit."""
        problems = [
            ("missing:", self.missing),
            ("half of a fused group:", self.half),
            ("not part of this model:", self.extra),
        ]
        raise_if_problems(place, problems)


def match_tensors(
    targets: Iterable[str],
    checkpoint: Checkpoint,
    sources: KeyMap,
    layout: Layout | None = None,
    ignorable: Callable[[str], bool] = lambda name: False,
    is_companion: Callable[[str], bool] = lambda name: False,
) -> Match:
    """Finds the pieces of each parameter.

    Args:
        targets: all parameters and needed buffers of the network.
        sources: for parameters whose name in the checkpoint differs or that several pieces make; a checkpoint that
            has the whole under the parameter's own name does as well.
        layout: how the checkpoint prefixes its names, if it does.
        ignorable: tells names that are not needed, in the checkpoint or in the network.
        is_companion: tells tensors that only describe others.
    """
    prefix = layout.prefix if layout else ""
    stored = {name for name in checkpoint.files if layout is None or layout.owns(name)}
    available = {name for name in stored if not ignorable(name)}
    plan: dict[str, tuple[TensorSlice, ...]] = {}
    missing: list[str] = []
    half: list[str] = []
    halves: set[str] = set()
    for target in targets:
        own = TensorSlice(prefix + target)
        pieces = sources.get(target, (own,))
        names = list(dict.fromkeys(piece.name for piece in pieces))
        present = [name for name in names if name in available]
        if len(present) == len(names):
            plan[target] = pieces
        elif not present and own.name in available:
            plan[target] = (own,)
        elif present:
            half.append(f"{target} (has {', '.join(present)} of {', '.join(names)})")
            halves.update(present)
        elif not ignorable(target):
            missing.extend(names)
    used = {piece.name for pieces in plan.values() for piece in pieces}
    extra = [name for name in available - used - halves if not is_companion(name)]
    return Match(plan, tuple(missing), tuple(half), tuple(sorted(extra)))
