"""One component of a model, opened: its checkpoint and which stored tensors make each parameter. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from klein_core.checkpoint.files import Checkpoint, ModelFiles
from klein_core.checkpoint.key_mapping import (
    DIFFUSERS,
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    KeyMap,
    Layout,
    TensorSlice,
    find_layout,
)
from klein_core.checkpoint.key_maps import (
    is_past,
    is_unneeded,
    text_encoder_key_map,
    transformer_key_map,
    vae_key_map,
)
from klein_core.errors import raise_if_problems
from klein_core.quantization.constants import is_companion
from klein_core.variants import TextEncoderConfig, TransformerConfig, VaeConfig

ComponentConfig = TransformerConfig | VaeConfig | TextEncoderConfig

_PLAIN_LAYOUT = Layout(component="", style=DIFFUSERS)


@dataclass(frozen=True)
class Component:
    """The tensors of one component, under the names that its network gives them."""

    checkpoint: Checkpoint
    key_map: KeyMap = field(default_factory=dict)
    """Parameter → the slices that make it. The tensor of the parameter's own name serves where it is not listed, or
    where none of its slices is in the checkpoint."""
    layout: Layout = _PLAIN_LAYOUT
    is_unneeded: Callable[[str], bool] = lambda name: False
    """Whether a name, of the checkpoint or of the network, is not needed. Such tensors are not read."""

    @classmethod
    def of(cls, config: ComponentConfig, checkpoint: Checkpoint) -> Component:
        """Finds how a checkpoint names the tensors of the component that `config` describes.

        Raises:
            CheckpointError: it holds no tensor of this component.
        """
        layout = find_layout(component_of(config), checkpoint)
        key_map, unneeded = _key_map(config, layout.style)
        return cls(checkpoint, layout.prefixed(key_map), layout, unneeded)

    def match(self, targets: Iterable[str], *, allow_companions: bool) -> Match:
        """Finds the slices of each parameter, by names alone.

        Args:
            targets: all parameters and needed buffers of the network.
            allow_companions: whether the checkpoint may hold scales and metadata of quantized tensors.
        """
        stored = {name for name in self.checkpoint.files if self.layout.owns(name)}
        available = {name for name in stored if not self.is_unneeded(name)}
        plan: dict[str, tuple[TensorSlice, ...]] = {}
        missing: list[str] = []
        half: list[str] = []
        halves: set[str] = set()
        for target in targets:
            whole = TensorSlice(self.layout.prefix + target)
            slices = self.key_map.get(target, (whole,))
            names = list(dict.fromkeys(each.name for each in slices))
            present = [name for name in names if name in available]
            if len(present) == len(names):
                plan[target] = slices
            elif not present and whole.name in available:
                plan[target] = (whole,)
            elif present:
                half.append(f"{target} (has {', '.join(present)} of {', '.join(names)})")
                halves.update(present)
            elif not self.is_unneeded(target):
                missing.extend(names)
        used = {each.name for slices in plan.values() for each in slices}
        extra = available - used - halves
        if allow_companions:
            extra = {name for name in extra if not is_companion(name)}
        return Match(plan, tuple(missing), tuple(half), tuple(sorted(extra)))


@dataclass(frozen=True)
class Match:
    """The tensors that make each parameter, and what does not fit; names are the checkpoint's."""

    plan: Mapping[str, tuple[TensorSlice, ...]]
    """Parameter → the slices that make it."""
    missing: tuple[str, ...]
    half: tuple[str, ...]
    """Parameters of which only some slices are there, each with both lists."""
    extra: tuple[str, ...]
    """Tensors that no parameter needs."""

    def raise_if_problems(self, path: Path) -> None:
        """Raises CheckpointError with every name that does not fit."""
        problems = [
            ("missing:", self.missing),
            ("half of a fused group:", self.half),
            ("not part of this model:", self.extra),
        ]
        raise_if_problems(path, problems)


def open_component(files: ModelFiles, config: ComponentConfig) -> Component:
    """Opens the checkpoint of the component that `config` describes.

    Raises:
        CheckpointError: the checkpoint is missing or corrupt, or holds no tensor of this component.
    """
    return Component.of(config, files.open(component_of(config)))


def component_of(config: ComponentConfig) -> str:
    """Returns `transformer`, `vae` or `text_encoder`."""
    match config:
        case TransformerConfig():
            return TRANSFORMER
        case VaeConfig():
            return VAE
        case TextEncoderConfig():
            return TEXT_ENCODER


def _key_map(config: ComponentConfig, style: str) -> tuple[KeyMap, Callable[[str], bool]]:
    match config:
        case TransformerConfig():
            return transformer_key_map(config, style), lambda name: False
        case VaeConfig():
            return vae_key_map(config, style), is_unneeded
        case TextEncoderConfig():
            return text_encoder_key_map(config), is_past(config)
