"""Reports on checkpoints, from headers and configuration files alone. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from klein_core.checkpoint.component import Component, ComponentConfig, Match, open_component
from klein_core.checkpoint.config import (
    read_sampling,
    read_text_encoder_config,
    read_transformer_config,
    read_vae_config,
    refuse_other_family,
)
from klein_core.checkpoint.files import Checkpoint, ModelFiles, open_checkpoint
from klein_core.checkpoint.key_mapping import (
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    components_among,
    find_layout,
    raise_if_named_otherwise,
)
from klein_core.errors import CheckpointError, listed
from klein_core.model_registry import PUBLISHED_MODELS, SMALL_DECODER, variants_of_shape
from klein_core.quantization.constants import FLOAT8, FLOAT8_E5M2, WEIGHT, companions_of, is_companion
from klein_core.quantization.formats import find_formats
from klein_core.quantization.metadata import read_quant_metadata
from klein_core.variants import TextEncoderConfig, TransformerConfig, VaeConfig

COMPONENTS = (TRANSFORMER, TEXT_ENCODER, VAE)
UNNEEDED = "not needed"
"""Group of the tensors that belong to no parameter."""
_PRECISIONS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": FLOAT8, "F8_E5M2": FLOAT8_E5M2}
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
"""First part of a parameter's name → the group that it is counted in; any other part is its own group."""
_TEXT_ENCODER_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "vocab_size",
)
_CONFIG_READERS: Mapping[str, Callable[[ModelFiles], ComponentConfig]] = {
    TRANSFORMER: read_transformer_config,
    VAE: read_vae_config,
    TEXT_ENCODER: read_text_encoder_config,
}


@dataclass(frozen=True)
class Report:
    """Contents of a file or folder."""

    path: Path
    components: tuple[ComponentReport, ...]
    metadata: Mapping[str, str]
    """Free text of the files' writers."""
    problems: tuple[str, ...]
    """What is wrong with the whole, or with a component that could not be opened."""

    @property
    def is_usable(self) -> bool:
        return not self.problems and all(component.is_usable for component in self.components)


@dataclass(frozen=True)
class ComponentReport:
    """One component of a file or folder."""

    component: str
    path: Path
    style: str
    """`diffusers`, `bfl` or `transformers`."""
    prefix: str
    shape: str
    """Its size in words; empty when it cannot be inferred."""
    variants: tuple[str, ...]
    """Published models that have such a component; several have equal tensors."""
    tensor_count: int
    byte_count: int
    shares: tuple[Share, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    problems: tuple[str, ...]
    """Why it cannot be loaded, besides what is missing and extra."""

    @property
    def is_usable(self) -> bool:
        return not (self.missing or self.extra or self.problems)


@dataclass(frozen=True)
class Share:
    """The tensors of one group that are stored in one precision."""

    group: str
    precision: str
    """`bf16`, `fp8` and so on, or the format's own name of another dtype."""
    tensor_count: int
    byte_count: int
    """Scales included."""


def inspect_path(path: Path) -> Report:
    """Reports on a safetensors file, a component's folder or a whole model's folder; reads no weights.

    Raises:
        CheckpointError: it is none of these, it is a model of another family, or its only file cannot be read.
    """
    refuse_other_family(ModelFiles(model=path))
    if any((path / component).is_dir() for component in COMPONENTS):
        return _inspect_model(path)
    checkpoint = open_checkpoint(path)
    found = components_among(checkpoint.files)
    if not found:
        raise_if_named_otherwise(checkpoint)
        what = "an adapter" if any("lora_" in name for name in checkpoint.files) else listed(checkpoint.files)
        raise CheckpointError(f"{path} holds no part of a klein model: it holds {what}")
    components = tuple(
        _inspect(component, ModelFiles.alone(component, path), checkpoint) for component in found
    )
    return Report(path, components, checkpoint.metadata(), ())


def check_component(component: str, files: ModelFiles) -> None:
    """Checks that a component's configuration and headers are there and list every tensor that it needs.

    Raises:
        CheckpointError: a file or a tensor is missing, or a tensor is extra. All names are listed.
    """
    opened = open_component(files, _CONFIG_READERS[component](files))
    match = opened.match(opened.key_map, allow_companions=True)
    match.raise_if_problems(opened.checkpoint.path)
    for slices in match.plan.values():
        for each in slices:
            opened.checkpoint.entry(each.name)


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
    try:
        read_sampling(files)
    except CheckpointError as error:
        problems.append(str(error))
    if not files.tokenizer_folder.is_dir():
        problems.append(f"{files.tokenizer_folder} is missing")
    return Report(folder, tuple(components), metadata, tuple(dict.fromkeys(problems)))


def _inspect(component: str, files: ModelFiles, checkpoint: Checkpoint) -> ComponentReport:
    layout = find_layout(component, checkpoint)
    names = [name for name in checkpoint.files if layout.owns(name)]
    problems: list[str] = []
    config: ComponentConfig | None = None
    match = Match({}, (), (), ())
    try:
        config = _CONFIG_READERS[component](files)
        opened = Component.of(config, checkpoint)
        match = opened.match(opened.key_map, allow_companions=True)
    except CheckpointError as error:
        problems.append(str(error))
    precisions = {
        name: _PRECISIONS.get(checkpoint.entry(name).dtype, checkpoint.entry(name).dtype) for name in names
    }
    try:
        precisions |= _quantized_precisions(match, names, checkpoint, layout.prefix)
    except CheckpointError as error:
        problems.append(str(error))
    return ComponentReport(
        component=component,
        path=checkpoint.path,
        style=layout.style,
        prefix=layout.prefix,
        shape=_in_words(config) if config else "",
        variants=_variants(files, config) if config else (),
        tensor_count=len(names),
        byte_count=sum(checkpoint.entry(name).byte_count for name in names),
        shares=_shares(match, names, checkpoint, precisions),
        missing=match.missing + match.half,
        extra=match.extra,
        problems=tuple(problems),
    )


def _quantized_precisions(
    match: Match, names: list[str], checkpoint: Checkpoint, prefix: str
) -> dict[str, str]:
    """Returns tensor → format, for the quantized ones that the component needs.

    Raises:
        CheckpointError: they cannot be read.
    """
    needed = {each.name for slices in match.plan.values() for each in slices}
    needed |= {name for name in names if is_companion(name) and name.rpartition(".")[0] + WEIGHT in needed}
    metadata = read_quant_metadata(checkpoint, needed, prefix)
    formats = find_formats(checkpoint.path, {name: checkpoint.entry(name) for name in needed}, metadata)
    return {name: found.kind for name, found in formats.items()}


def _shares(
    match: Match, names: list[str], checkpoint: Checkpoint, precisions: Mapping[str, str]
) -> tuple[Share, ...]:
    """Counts tensors and bytes by group and precision: largest groups first, unneeded tensors last."""
    groups = {
        each.name: _GROUPS.get(target.split(".")[0], target.split(".")[0])
        for target, slices in match.plan.items()
        for each in slices
    }
    sums: dict[tuple[str, str], list[int]] = {}
    for name in (name for name in names if not is_companion(name)):
        own = [other for other in companions_of(name).values() if other in checkpoint.files and other != name]
        total = sums.setdefault((groups.get(name, UNNEEDED), precisions[name]), [0, 0])
        total[0] += 1
        total[1] += sum(checkpoint.entry(each).byte_count for each in (name, *own))
    shares = [Share(group, precision, *total) for (group, precision), total in sums.items()]
    return tuple(sorted(shares, key=lambda share: (share.group == UNNEEDED, -share.byte_count, share.group)))


def _variants(files: ModelFiles, config: ComponentConfig) -> tuple[str, ...]:
    """Returns the published models that have such a component."""
    match config:
        case TransformerConfig():
            fitting = variants_of_shape(config)
            if files.index_path is not None:
                # An unreadable index is one of the model's problems; it excludes no variant.
                with suppress(CheckpointError):
                    index = read_sampling(files)
                    sampling = (index.is_distilled, index.uses_reference_cache)
                    fitting = tuple(
                        row for row in fitting if (row.is_distilled, row.uses_reference_cache) == sampling
                    )
            return tuple(row.name for row in fitting)
        case TextEncoderConfig():
            return tuple(
                row.name
                for row in PUBLISHED_MODELS.values()
                if all(
                    row.text_encoder.qwen3.get(key) == config.qwen3.get(key) for key in _TEXT_ENCODER_SIZES
                )
            )
        case VaeConfig():
            if config == SMALL_DECODER.vae:
                return (SMALL_DECODER.name,)
            return tuple(row.name for row in PUBLISHED_MODELS.values() if row.vae == config)


def _in_words(config: ComponentConfig) -> str:
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
