"""What a file or folder is, by its headers and configurations alone. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from klein_core.checkpoint.config import (
    read_sampling,
    read_text_encoder_config,
    read_transformer_config,
    read_vae_config,
)
from klein_core.checkpoint.files import Checkpoint, ModelFiles, open_checkpoint
from klein_core.checkpoint.key_mapping import (
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    KeyMap,
    Layout,
    Match,
    companions_of,
    components_among,
    find_layout,
    is_companion,
    match_tensors,
)
from klein_core.checkpoint.key_maps import (
    is_past,
    is_unneeded,
    text_encoder_key_map,
    transformer_key_map,
    vae_key_map,
)
from klein_core.errors import CheckpointError, listed
from klein_core.model_registry import PUBLISHED_MODELS, SMALL_DECODER, variants_of_shape
from klein_core.quantization.formats import find_forms
from klein_core.quantization.metadata import read_quant_metadata
from klein_core.variants import TextEncoderConfig, TransformerConfig, VaeConfig

COMPONENTS = (TRANSFORMER, TEXT_ENCODER, VAE)
UNNEEDED = "not needed"
_PRECISIONS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8", "F8_E5M2": "fp8 e5m2"}
_GROUPS = {
    "transformer_blocks": "double-stream blocks",
    "single_transformer_blocks": "single-stream blocks",
    "x_embedder": "embedders",
    "context_embedder": "embedders",
    "time_guidance_embed": "embedders",
    "double_stream_modulation_img": "modulation",
    "double_stream_modulation_txt": "modulation",
    "single_stream_modulation": "modulation",
    "norm_out": "head",
    "proj_out": "head",
    "embed_tokens": "embedding table",
    "layers": "layers",
    "quant_conv": "latents",
    "post_quant_conv": "latents",
    "bn": "latents",
}
"""First word of a parameter's name → the group that it is counted in; others are their own."""
_TEXT_ENCODER_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "vocab_size",
)
_Config = TransformerConfig | VaeConfig | TextEncoderConfig


def inspect_place(place: Path) -> Report:
    """Reports on a safetensors file, a component's folder or a whole model's folder; reads no weights.

    Raises:
        CheckpointError: it is none of these, or the one file there is cannot be read.
    """
    if any((place / component).is_dir() for component in COMPONENTS):
        return _inspect_model(place)
    checkpoint = open_checkpoint(place)
    found = components_among(checkpoint.files)
    if not found:
        what = "an adapter" if any("lora_" in name for name in checkpoint.files) else listed(checkpoint.files)
        raise CheckpointError(f"{place} holds no part of a klein model: it holds {what}")
    files = {component: ModelFiles.alone(component, place) for component in found}
    components = tuple(_inspect(component, files[component], checkpoint) for component in found)
    return Report(place, components, checkpoint.metadata(), ())


def check_component(component: str, files: ModelFiles) -> None:
    """Checks by configuration and headers that a component's files are there and name what it needs.

    Raises:
        CheckpointError: they do not; with names.
    """
    checkpoint, config = files.open(component), _READERS[component](files)
    layout = find_layout(component, checkpoint)
    sources, ignorable = _sources(config, layout)
    match = match_tensors(sources, checkpoint, sources, layout, ignorable, is_companion)
    match.raise_if_problems(checkpoint.place)
    for pieces in match.plan.values():
        for piece in pieces:
            checkpoint.entry(piece.name)


def _inspect_model(folder: Path) -> Report:
    files = ModelFiles(model=folder)
    components: list[ComponentReport] = []
    metadata: dict[str, str] = {}
    problems: list[str] = []
    for component in COMPONENTS:
        try:
            checkpoint = files.open(component)
            metadata |= checkpoint.metadata()
            components.append(_inspect(component, files, checkpoint))
        except CheckpointError as error:
            problems.append(str(error))
    problems += _problem(lambda: read_sampling(files))
    if not files.tokenizer_folder.is_dir():
        problems.append(f"{files.tokenizer_folder} is missing")
    return Report(folder, tuple(components), metadata, tuple(dict.fromkeys(problems)))


def _inspect(component: str, files: ModelFiles, checkpoint: Checkpoint) -> ComponentReport:
    layout = find_layout(component, checkpoint)
    problems: list[str] = []
    names = [name for name in checkpoint.files if layout.owns(name)]
    config: _Config | None = None
    match = Match({}, (), (), ())
    try:
        config = _READERS[component](files)
        sources, ignorable = _sources(config, layout)
        match = match_tensors(sources, checkpoint, sources, layout, ignorable, is_companion)
    except CheckpointError as error:
        problems.append(str(error))
    needed = {piece.name for pieces in match.plan.values() for piece in pieces}
    precisions, problem = _precisions(checkpoint, layout, needed)
    return ComponentReport(
        component=component,
        place=checkpoint.place,
        style=layout.style,
        prefix=layout.prefix,
        shape=_in_words(config) if config else "",
        variants=_variants(files, config) if config else (),
        tensor_count=len(names),
        byte_count=sum(checkpoint.entry(name).byte_count for name in names),
        shares=_shares(match, names, checkpoint, precisions),
        missing=match.missing + match.half,
        extra=match.extra,
        problems=(*problems, *problem),
    )


_READERS: Mapping[str, Callable[[ModelFiles], _Config]] = {
    TRANSFORMER: read_transformer_config,
    VAE: read_vae_config,
    TEXT_ENCODER: read_text_encoder_config,
}


def _sources(config: _Config, layout: Layout) -> tuple[KeyMap, Callable[[str], bool]]:
    """Returns every parameter with its pieces, and which stored tensors are not needed."""
    match config:
        case TransformerConfig():
            return layout.prefixed(transformer_key_map(config, layout.style)), lambda name: False
        case VaeConfig():
            return layout.prefixed(vae_key_map(config, layout.style)), is_unneeded
        case TextEncoderConfig():
            return layout.prefixed(text_encoder_key_map(config)), is_past(config)


def _precisions(
    checkpoint: Checkpoint, layout: Layout, needed: set[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Returns each stored tensor's precision, and why quantized ones cannot be read."""
    names = {name for name in checkpoint.files if layout.owns(name)}
    entries = {name: checkpoint.entry(name) for name in names}
    precisions = {name: _PRECISIONS.get(entry.dtype, entry.dtype) for name, entry in entries.items()}
    of_needed = {
        name for name in names if name in needed or (is_companion(name) and _described(name) in needed)
    }
    try:
        notes = read_quant_metadata(checkpoint, of_needed, layout.prefix)
        forms = find_forms(checkpoint.place, {name: entries[name] for name in of_needed}, notes)
    except CheckpointError as error:
        return precisions, (str(error),)
    return precisions | {name: form.kind for name, form in forms.items()}, ()


def _described(companion: str) -> str:
    return companion.rpartition(".")[0] + ".weight"


def _shares(
    match: Match, names: list[str], checkpoint: Checkpoint, precisions: Mapping[str, str]
) -> tuple[Share, ...]:
    """Sums tensors and bytes by group and precision, largest groups first, what is not needed last."""
    groups = {
        piece.name: _GROUPS.get(target.split(".")[0], target.split(".")[0])
        for target, pieces in match.plan.items()
        for piece in pieces
    }
    sums: dict[tuple[str, str], list[int]] = {}
    for name in (name for name in names if not is_companion(name)):
        own = [other for other in companions_of(name).values() if other in checkpoint.files and other != name]
        total = sums.setdefault((groups.get(name, UNNEEDED), precisions[name]), [0, 0])
        total[0] += 1
        total[1] += sum(checkpoint.entry(each).byte_count for each in (name, *own))
    shares = [Share(group, precision, *total) for (group, precision), total in sums.items()]
    return tuple(sorted(shares, key=lambda share: (share.group == UNNEEDED, -share.byte_count, share.group)))


def _variants(files: ModelFiles, config: _Config) -> tuple[str, ...]:
    match config:
        case TransformerConfig():
            return _transformer_variants(files, config)
        case TextEncoderConfig():
            return tuple(
                row.name for row in PUBLISHED_MODELS.values() if _same_size(row.text_encoder, config)
            )
        case VaeConfig():
            if config == SMALL_DECODER.vae:
                return (SMALL_DECODER.name,)
            return tuple(row.name for row in PUBLISHED_MODELS.values() if row.vae == config)


def _same_size(one: TextEncoderConfig, other: TextEncoderConfig) -> bool:
    return all(one.qwen3.get(key) == other.qwen3.get(key) for key in _TEXT_ENCODER_SIZES)


def _transformer_variants(files: ModelFiles, config: TransformerConfig) -> tuple[str, ...]:
    fitting = variants_of_shape(config)
    if files.index_path is None:
        return tuple(row.name for row in fitting)
    try:
        told = read_sampling(files)
    except CheckpointError:
        return tuple(row.name for row in fitting)
    return tuple(
        row.name
        for row in fitting
        if (row.is_distilled, row.uses_reference_cache) == (told.is_distilled, told.uses_reference_cache)
    )


def _in_words(config: _Config) -> str:
    match config:
        case TransformerConfig():
            return (
                f"{config.num_layers} double and {config.num_single_layers} single blocks, "
                f"{config.num_attention_heads} heads of {config.attention_head_dim}"
            )
        case TextEncoderConfig():
            return (
                f"Qwen3, {config.qwen3['num_hidden_layers']} layers of {config.hidden_size}, "
                f"needed up to {max(config.tapped_layers)}"
            )
        case VaeConfig():
            encoder = config.block_out_channels
            decoder = config.decoder_block_out_channels or encoder
            return f"widths {', '.join(map(str, encoder))}; decoder {', '.join(map(str, decoder))}"


def _problem(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except CheckpointError as error:
        return [str(error)]
    return []


@dataclass(frozen=True)
class Share:
    """The tensors of one group that are stored in one precision."""

    group: str
    precision: str
    """`bf16`, `fp8` and so on, or the format's own name of a dtype that no weights have."""
    tensor_count: int
    byte_count: int
    """Scales included."""


@dataclass(frozen=True)
class ComponentReport:
    """One component of a file or folder."""

    component: str
    place: Path
    style: str
    """`diffusers`, `bfl` or `transformers`."""
    prefix: str
    shape: str
    """Its size in words; empty when it cannot be told."""
    variants: tuple[str, ...]
    """Known models that it can be of; equal tensors can be of several."""
    tensor_count: int
    byte_count: int
    shares: tuple[Share, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    problems: tuple[str, ...]
    """Why it cannot be loaded, beside what is missing and extra."""

    @property
    def is_usable(self) -> bool:
        return not (self.missing or self.extra or self.problems)


@dataclass(frozen=True)
class Report:
    """All that a file or folder holds."""

    place: Path
    components: tuple[ComponentReport, ...]
    metadata: Mapping[str, str]
    """Free text of the files' writers."""
    problems: tuple[str, ...]
    """What is wrong with the whole or with a component that could not be opened."""

    @property
    def is_usable(self) -> bool:
        return not self.problems and all(component.is_usable for component in self.components)
