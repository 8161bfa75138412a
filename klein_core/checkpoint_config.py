"""Reads a diffusers folder's configuration files into a `Variant`, refusing what this library does not do.

Torch-free. A value that would change the picture and is not supported is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klein_core.checkpoint import shapes
from klein_core.checkpoint.layouts import TEXT_ENCODER, TRANSFORMER, VAE
from klein_core.checkpoint.model_files import ModelFiles
from klein_core.errors import CheckpointError
from klein_core.known_variants import KNOWN_VARIANTS, known_variant, variant_of_bare_file, variants_of_shape
from klein_core.quantization.notes import configured_algorithm
from klein_core.variants import (
    SchedulerConfig,
    TextEncoderConfig,
    TransformerConfig,
    VaeConfig,
    Variant,
    read_json,
)

TEXT_ENCODER_FOLDER = "text_encoder"
TOKENIZER_FOLDER = "tokenizer"
TRANSFORMER_FOLDER = "transformer"
VAE_FOLDER = "vae"
SCHEDULER_FOLDER = "scheduler"

_PIPELINE = "Flux2KleinPipeline"
_REFERENCE_CACHE_PIPELINE = "Flux2KleinKVPipeline"
_PIPELINES = (_PIPELINE, _REFERENCE_CACHE_PIPELINE)
_CLASSES: dict[str, tuple[str, ...]] = {
    TEXT_ENCODER_FOLDER: ("Qwen3ForCausalLM", "Qwen3Model"),
    TOKENIZER_FOLDER: ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
    TRANSFORMER_FOLDER: ("Flux2Transformer2DModel",),
    VAE_FOLDER: ("AutoencoderKLFlux2",),
    SCHEDULER_FOLDER: ("FlowMatchEulerDiscreteScheduler",),
}
_VAE_LEVELS = 4

# Keys whose other values would need code that is not here; an absent key means klein's value.
_TRANSFORMER_ONLY: dict[str, Any] = {"patch_size": 1, "guidance_embeds": False}
_VAE_ONLY: dict[str, Any] = {
    "act_fn": "silu",
    "down_block_types": ["DownEncoderBlock2D"] * _VAE_LEVELS,
    "up_block_types": ["UpDecoderBlock2D"] * _VAE_LEVELS,
    "patch_size": [2, 2],
    "in_channels": 3,
    "out_channels": 3,
}
_SCHEDULER_ONLY: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}


@dataclass(frozen=True)
class PipelineIndex:
    """What `model_index.json` says about sampling; the shapes are each component's own."""

    is_distilled: bool
    uses_reference_cache: bool


def read_pipeline_index(folder: Path | str) -> PipelineIndex:
    """Reads `model_index.json`.

    Raises:
        CheckpointError: it is missing or malformed, or names a class that is not supported.
    """
    path = Path(folder) / "model_index.json"
    index = read_json(path)
    _check_index(path, index)
    uses_reference_cache = index["_class_name"] == _REFERENCE_CACHE_PIPELINE
    # Each pipeline class has its own default for a key that is not there.
    is_distilled = _flag(path, index, "is_distilled", uses_reference_cache)
    return PipelineIndex(is_distilled, uses_reference_cache)


def read_sampling(files: ModelFiles | Path | str) -> PipelineIndex:
    """Tells how a model is sampled: as its named variant is, else as its `model_index.json` says.

    Raises:
        CheckpointError: neither is there, as the tensors of several variants are alike; the message lists those
            that it could be. Or the named variant is of another shape.
    """
    files = ModelFiles.of(files)
    if not files.variant and files.index_path is not None:
        return read_pipeline_index(files.index_path.parent)
    place, transformer = files.place(TRANSFORMER), read_transformer_config(files)
    try:
        if files.variant and not variants_of_shape(transformer):
            # A pruned or grown one of them is sampled as they are.
            row = known_variant(files.variant)
        else:
            row = variant_of_bare_file(transformer, files.variant or None)
    except CheckpointError as error:
        raise CheckpointError(f"{place}: {error} (setting: variant)") from None
    return PipelineIndex(row.is_distilled, row.uses_reference_cache)


def read_variant(files: ModelFiles | Path | str) -> Variant:
    """Reads a whole model's configuration; shapes of tensors tell it for parts that are bare files.

    Raises:
        CheckpointError: a file is missing or malformed, a class or a value is not supported, or two
            components do not fit each other.
    """
    files = ModelFiles.of(files)
    sampling = read_sampling(files)
    variant = Variant(
        text_encoder=read_text_encoder_config(files),
        transformer=read_transformer_config(files),
        vae=read_vae_config(files),
        is_distilled=sampling.is_distilled,
        uses_reference_cache=sampling.uses_reference_cache,
        scheduler=SchedulerConfig()
        if files.index_path is None
        else read_scheduler_config(files.index_path.parent),
    )
    _check_fit(files, variant)
    return variant


def read_text_encoder_config(files: ModelFiles | Path | str) -> TextEncoderConfig:
    """Reads `text_encoder/config.json`, or the tensors' shapes where there is none.

    Raises:
        CheckpointError: as `read_variant`, or it is the text encoder of another size than the named variant's.
    """
    files = ModelFiles.of(files)
    path = files.config_path(TEXT_ENCODER)
    config = _read_text_encoder_file(path) if path else shapes.text_encoder_config(files.open(TEXT_ENCODER))
    _check_size(files, config)
    return config


def _read_text_encoder_file(path: Path) -> TextEncoderConfig:
    """Reads a text encoder's config.json.

    Two optional keys are the pipeline's, not Qwen3's: `text_encoder_out_layers` and `max_sequence_length`.
    """
    config = read_json(path)
    _only(path, config, {"model_type": "qwen3"})
    configured_algorithm(path, config)
    layer_count = _integer(path, config, "num_hidden_layers")
    for key in ("hidden_size", "vocab_size", "num_attention_heads"):
        _integer(path, config, key)
    taps = _integers(path, config, "text_encoder_out_layers", TextEncoderConfig.tapped_layers)
    length = _integer(path, config, "max_sequence_length", TextEncoderConfig.sequence_length)
    if max(taps) >= layer_count:
        raise CheckpointError(
            f"{path}: text_encoder_out_layers is {list(taps)}; each must be below num_hidden_layers "
            f"({layer_count}), whose output is normed"
        )
    return TextEncoderConfig(qwen3=config, tapped_layers=taps, sequence_length=length)


def read_transformer_config(files: ModelFiles | Path | str) -> TransformerConfig:
    """Reads `transformer/config.json`, or the tensors' shapes where there is none."""
    files = ModelFiles.of(files)
    path = files.config_path(TRANSFORMER)
    if path is None:
        return shapes.transformer_config(files.open(TRANSFORMER))
    config = read_json(path)
    _check_class(
        path, "_class_name", config.get("_class_name", _CLASSES[TRANSFORMER_FOLDER][0]), TRANSFORMER_FOLDER
    )
    _only(path, config, _TRANSFORMER_ONLY)
    configured_algorithm(path, config)
    default = TransformerConfig
    read = TransformerConfig(
        num_layers=_integer(path, config, "num_layers"),
        num_single_layers=_integer(path, config, "num_single_layers"),
        num_attention_heads=_integer(path, config, "num_attention_heads"),
        attention_head_dim=_integer(path, config, "attention_head_dim", default.attention_head_dim),
        joint_attention_dim=_integer(path, config, "joint_attention_dim"),
        in_channels=_integer(path, config, "in_channels", default.in_channels),
        mlp_ratio=_number(path, config, "mlp_ratio", default.mlp_ratio),
        axes_dims_rope=_integers(path, config, "axes_dims_rope", default.axes_dims_rope),
        rope_theta=_number(path, config, "rope_theta", default.rope_theta),
        timestep_guidance_channels=_integer(
            path, config, "timestep_guidance_channels", default.timestep_guidance_channels
        ),
        eps=_number(path, config, "eps", default.eps),
    )
    _only(
        path,
        {"out_channels": config.get("out_channels") or read.in_channels},
        {"out_channels": read.in_channels},
    )
    if sum(read.axes_dims_rope) != read.attention_head_dim or len(read.axes_dims_rope) != 4:
        raise CheckpointError(
            f"{path}: axes_dims_rope is {list(read.axes_dims_rope)}; it must be four numbers that add up to "
            f"attention_head_dim ({read.attention_head_dim})"
        )
    return read


def read_vae_config(files: ModelFiles | Path | str) -> VaeConfig:
    """Reads `vae/config.json`, or the tensors' shapes where there is none."""
    files = ModelFiles.of(files)
    path = files.config_path(VAE)
    if path is None:
        read = shapes.vae_config(files.open(VAE))
        _check_widths(files.place(VAE), read)
        return read
    config = read_json(path)
    _check_class(path, "_class_name", config.get("_class_name", _CLASSES[VAE_FOLDER][0]), VAE_FOLDER)
    _only(path, config, _VAE_ONLY | {"quantization_config": None})
    default = VaeConfig
    decoder_widths = None
    if config.get("decoder_block_out_channels") is not None:
        decoder_widths = _integers(path, config, "decoder_block_out_channels", ())
    read = VaeConfig(
        block_out_channels=_integers(path, config, "block_out_channels", default.block_out_channels),
        decoder_block_out_channels=decoder_widths,
        layers_per_block=_integer(path, config, "layers_per_block", default.layers_per_block),
        latent_channels=_integer(path, config, "latent_channels", default.latent_channels),
        norm_num_groups=_integer(path, config, "norm_num_groups", default.norm_num_groups),
        batch_norm_eps=_number(path, config, "batch_norm_eps", default.batch_norm_eps),
        use_quant_conv=_flag(path, config, "use_quant_conv", default.use_quant_conv),
        use_post_quant_conv=_flag(path, config, "use_post_quant_conv", default.use_post_quant_conv),
        mid_block_add_attention=_flag(
            path, config, "mid_block_add_attention", default.mid_block_add_attention
        ),
        sample_size=_integer(path, config, "sample_size", default.sample_size),
    )
    _check_widths(path, read)
    return read


def _check_widths(path: Path, read: VaeConfig) -> None:
    for key, widths in (
        ("block_out_channels", read.block_out_channels),
        ("decoder_block_out_channels", read.decoder_block_out_channels),
    ):
        if widths is not None and (
            len(widths) != _VAE_LEVELS or any(width % read.norm_num_groups for width in widths)
        ):
            raise CheckpointError(
                f"{path}: {key} is {list(widths)}; it must be {_VAE_LEVELS} multiples of norm_num_groups "
                f"({read.norm_num_groups})"
            )


def read_scheduler_config(folder: Path | str) -> SchedulerConfig:
    """Reads `scheduler/scheduler_config.json`; the shift's constants are not in it but in the sampler."""
    path = Path(folder) / SCHEDULER_FOLDER / "scheduler_config.json"
    config = read_json(path)
    _check_class(
        path, "_class_name", config.get("_class_name", _CLASSES[SCHEDULER_FOLDER][0]), SCHEDULER_FOLDER
    )
    _only(path, config, _SCHEDULER_ONLY)
    return SchedulerConfig()


def _check_index(path: Path, index: Mapping[str, Any]) -> None:
    if index.get("_class_name") not in _PIPELINES:
        raise CheckpointError(
            f"{path}: _class_name is {index.get('_class_name')!r}; only {' or '.join(_PIPELINES)} is supported"
        )
    for component in _CLASSES:
        entry = index.get(component)
        if not isinstance(entry, list) or len(entry) != 2:
            raise CheckpointError(f"{path}: {component} must be [library, class], not {entry!r}")
        _check_class(path, component, entry[1], component)


def _check_class(path: Path, key: str, name: object, component: str) -> None:
    if name not in _CLASSES[component]:
        supported = " or ".join(_CLASSES[component])
        raise CheckpointError(f"{path}: {key} is {name}; only {supported} is supported")


def _check_size(files: ModelFiles, config: TextEncoderConfig) -> None:
    """Refuses the text encoder of another published size; one that nobody published may be anything."""
    if not files.variant:
        return
    published = {row.text_encoder.hidden_size for row in KNOWN_VARIANTS.values()}
    needed = known_variant(files.variant).text_encoder.hidden_size
    if config.hidden_size in published - {needed}:
        raise CheckpointError(
            f"{files.place(TEXT_ENCODER)} is the text encoder of another size: its hidden size is "
            f"{config.hidden_size}, {files.variant} needs {needed}"
        )


def _check_fit(files: ModelFiles, variant: Variant) -> None:
    transformer, text_encoder = files.place(TRANSFORMER), files.place(TEXT_ENCODER)
    if variant.transformer.in_channels != variant.vae.packed_channels:
        raise CheckpointError(
            f"{transformer} takes {variant.transformer.in_channels} latent channels "
            f"but the VAE {files.place(VAE)} makes {variant.vae.packed_channels}"
        )
    if variant.transformer.joint_attention_dim != variant.text_encoder.embedding_channels:
        raise CheckpointError(
            f"{transformer} takes {variant.transformer.joint_attention_dim} text channels "
            f"but the text encoder {text_encoder} makes {variant.text_encoder.embedding_channels} "
            f"from layers {list(variant.text_encoder.tapped_layers)}"
        )


def _only(path: Path, config: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    """Refuses keys that are present with another value than the one that is supported."""
    for key, value in supported.items():
        if key in config and config[key] != value:
            raise CheckpointError(f"{path}: {key} is {config[key]!r}; only {value!r} is supported")


def _integer(path: Path, config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key, default)
    if value is None:
        raise CheckpointError(f"{path}: {key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{path}: {key} is {value!r}; it must be a whole number above 0")
    return value


def _integers(path: Path, config: Mapping[str, Any], key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    value = config.get(key, default)
    if not isinstance(value, list | tuple) or not value:
        raise CheckpointError(f"{path}: {key} is {value!r}; it must be a list of whole numbers")
    return tuple(_integer(path, {key: item}, key) for item in value)


def _number(path: Path, config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise CheckpointError(f"{path}: {key} is {value!r}; it must be a number above 0")
    return float(value)


def _flag(path: Path, config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{path}: {key} is {value!r}; it must be true or false")
    return value
