"""Configuration of a model: reads and checks the JSON files of its components. Torch-free.

A value that is missing, wrong or not supported raises CheckpointError, which names the file and the key.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from klein_core.checkpoint import config_keys, infer_config
from klein_core.checkpoint.config_keys import LARGEST_INTEGER, LARGEST_LAYER_COUNT, ConfigFile, check_class
from klein_core.checkpoint.files import ModelFiles
from klein_core.checkpoint.key_mapping import TEXT_ENCODER, TRANSFORMER, VAE
from klein_core.errors import CheckpointError
from klein_core.model_registry import (
    PUBLISHED_MODELS,
    other_family,
    published_model,
    variant_of_bare_file,
    variants_of_shape,
)
from klein_core.quantization.metadata import configured_algorithm
from klein_core.variants import (
    PUBLISHED_SCHEDULE,
    NoiseSchedule,
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
"""Folder of a component → the names of its supported classes."""
_TILE_MULTIPLE_PX = 32
"""A tile's side is a multiple of four latents, so that a quarter of it, the overlap, is a whole number of latents."""


@dataclass(frozen=True)
class Sampling:
    """Sampling of a model as `model_index.json` declares it."""

    is_distilled: bool
    uses_reference_cache: bool
    schedule: NoiseSchedule = PUBLISHED_SCHEDULE


def read_variant(files: ModelFiles | Path | str) -> Variant:
    """Reads a whole model's configuration; that of a bare file is inferred from the shapes of its tensors.

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
        # A whole model names its scheduler, as diffusers requires; one stage may be mounted without it.
        schedule=sampling.schedule
        if files.index_path is None
        else read_noise_schedule(files.index_path.parent),
    )
    _check_fit(files, variant)
    return variant


def read_pipeline_index(folder: Path | str) -> Sampling:
    """Reads `model_index.json`.

    Raises:
        CheckpointError: it is missing or malformed, or names a class that is not supported.
    """
    index = ConfigFile.read(Path(folder) / "model_index.json")
    check_class(index.path, "_class_name", index.values.get("_class_name"), _PIPELINES)
    for component, classes in _CLASSES.items():
        entry = index.values.get(component)
        if not isinstance(entry, list) or len(entry) != 2:
            raise CheckpointError(f"{index.path}: {component} must be [library, class], not {entry!r}")
        check_class(index.path, component, entry[1], classes)
    uses_reference_cache = index.values["_class_name"] == _REFERENCE_CACHE_PIPELINE
    # The default of a missing key depends on the pipeline class.
    is_distilled = index.flag("is_distilled", uses_reference_cache)
    return Sampling(is_distilled, uses_reference_cache, _schedule_of(Path(folder)))


def read_sampling(files: ModelFiles | Path | str) -> Sampling:
    """Returns how a model is sampled: like its named variant, or else as its `model_index.json` declares.

    Raises:
        CheckpointError: the named variant has another shape. Or neither is given and several variants have these
            tensors; the message lists them.
    """
    files = ModelFiles.of(files)
    if not files.variant and files.index_path is not None:
        return read_pipeline_index(files.index_path.parent)
    path, transformer = files.path(TRANSFORMER), read_transformer_config(files)
    try:
        if files.variant and not variants_of_shape(transformer):
            # No published model has this shape (pruned or grown): it is sampled like the named one.
            row = published_model(files.variant)
        else:
            row = variant_of_bare_file(transformer, files.variant or None)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error} (setting: variant)") from None
    index = files.index_path
    schedule = PUBLISHED_SCHEDULE if index is None else _schedule_of(index.parent)
    return Sampling(row.is_distilled, row.uses_reference_cache, schedule)


def _schedule_of(folder: Path) -> NoiseSchedule:
    """Returns the schedule of a model's folder; the published one where only a stage's own component is mounted."""
    return read_noise_schedule(folder) if (folder / SCHEDULER_FOLDER).exists() else PUBLISHED_SCHEDULE


def read_text_encoder_config(files: ModelFiles | Path | str) -> TextEncoderConfig:
    """Reads `text_encoder/config.json`, or infers the configuration from the tensors' shapes.

    Raises:
        CheckpointError: as `read_variant`, or the text encoder is that of another published size.
    """
    files = ModelFiles.of(files)
    refuse_other_family(files)
    path = files.config_path(TEXT_ENCODER)
    config = (
        _read_text_encoder_file(path) if path else infer_config.text_encoder_config(files.open(TEXT_ENCODER))
    )
    if files.variant:
        # Any unpublished size is accepted, so that pruned text encoders load.
        published = {row.text_encoder.hidden_size for row in PUBLISHED_MODELS.values()}
        needed = published_model(files.variant).text_encoder.hidden_size
        if config.hidden_size in published - {needed}:
            raise CheckpointError(
                f"{files.path(TEXT_ENCODER)} is the text encoder of another size: its hidden size is "
                f"{config.hidden_size}, {files.variant} needs {needed}"
            )
    return config


def _read_text_encoder_file(path: Path) -> TextEncoderConfig:
    """Reads a text encoder's config.json.

    Two optional keys belong to the pipeline and not to Qwen3: `text_encoder_out_layers` and `max_sequence_length`.
    """
    config = ConfigFile.read(path)
    config.require_only(config_keys.TEXT_ENCODER.fixed)
    configured_algorithm(path, config.values)
    layer_count = config.integer("num_hidden_layers", largest=LARGEST_LAYER_COUNT)
    for key in ("hidden_size", "vocab_size", "num_attention_heads"):
        config.integer(key)
    for key in ("head_dim", "intermediate_size", "num_key_value_heads"):
        if config.values.get(key) is not None:
            config.integer(key)
    taps = config.integers("text_encoder_out_layers", TextEncoderConfig.tapped_layers)
    length = config.integer("max_sequence_length", TextEncoderConfig.sequence_length)
    if max(taps) >= layer_count:
        needed = f"each must be below num_hidden_layers ({layer_count}), whose output is normalized"
        raise config.error("text_encoder_out_layers", list(taps), needed)
    return TextEncoderConfig(qwen3=dict(config.values), tapped_layers=taps, sequence_length=length)


def read_transformer_config(files: ModelFiles | Path | str) -> TransformerConfig:
    """Reads `transformer/config.json`, or infers the configuration from the tensors' shapes.

    Raises:
        CheckpointError: as `read_variant`.
    """
    files = ModelFiles.of(files)
    refuse_other_family(files)
    path = files.config_path(TRANSFORMER)
    if path is None:
        return infer_config.transformer_config(files.open(TRANSFORMER))
    config = ConfigFile.read(path)
    config.require_class(_CLASSES[TRANSFORMER_FOLDER])
    config.require_only(config_keys.TRANSFORMER.fixed)
    configured_algorithm(path, config.values)
    default = TransformerConfig
    read = TransformerConfig(
        num_layers=config.integer("num_layers", largest=LARGEST_LAYER_COUNT),
        num_single_layers=config.integer("num_single_layers", largest=LARGEST_LAYER_COUNT),
        num_attention_heads=config.integer("num_attention_heads"),
        attention_head_dim=config.integer("attention_head_dim", default.attention_head_dim),
        joint_attention_dim=config.integer("joint_attention_dim"),
        in_channels=config.integer("in_channels", default.in_channels),
        mlp_ratio=config.number("mlp_ratio", default.mlp_ratio),
        axes_dims_rope=config.integers("axes_dims_rope", default.axes_dims_rope),
        rope_theta=config.number("rope_theta", default.rope_theta),
        timestep_guidance_channels=config.integer(
            "timestep_guidance_channels", default.timestep_guidance_channels
        ),
        eps=config.number("eps", default.eps),
    )
    if config.values.get("out_channels"):
        config.require_only({"out_channels": read.in_channels})
    _check_products(config, read)
    return read


def _check_products(config: ConfigFile, read: TransformerConfig) -> None:
    """Rejects combinations that no layer can be built with, although each number is allowed."""
    axes = read.axes_dims_rope
    if sum(axes) != read.attention_head_dim or len(axes) != 4 or any(axis % 2 for axis in axes):
        needed = f"it must be four even numbers that add up to attention_head_dim ({read.attention_head_dim})"
        raise config.error("axes_dims_rope", list(axes), needed)
    if read.timestep_guidance_channels % 2:
        raise config.error("timestep_guidance_channels", read.timestep_guidance_channels, "it must be even")
    inner_size = int(read.hidden_size * read.mlp_ratio)
    for key, width in (("num_attention_heads", read.hidden_size), ("mlp_ratio", inner_size)):
        if not 1 <= width <= LARGEST_INTEGER:
            needed = f"the resulting width, {width}, must be in 1 … {LARGEST_INTEGER}"
            raise config.error(key, getattr(read, key), needed)


def read_vae_config(files: ModelFiles | Path | str) -> VaeConfig:
    """Reads `vae/config.json`, or infers the configuration from the tensors' shapes.

    Raises:
        CheckpointError: as `read_variant`.
    """
    files = ModelFiles.of(files)
    refuse_other_family(files)
    path = files.config_path(VAE)
    if path is None:
        read = infer_config.vae_config(files.open(VAE))
        _check_widths(files.path(VAE), read)
        return read
    config = ConfigFile.read(path)
    config.require_class(_CLASSES[VAE_FOLDER])
    config.require_only(config_keys.VAE.fixed)
    default = VaeConfig
    decoder_widths = None
    if config.values.get("decoder_block_out_channels") is not None:
        decoder_widths = config.integers("decoder_block_out_channels")
    read = VaeConfig(
        block_out_channels=config.integers("block_out_channels", default.block_out_channels),
        decoder_block_out_channels=decoder_widths,
        layers_per_block=config.integer("layers_per_block", default.layers_per_block, LARGEST_LAYER_COUNT),
        latent_channels=config.integer("latent_channels", default.latent_channels),
        norm_num_groups=config.integer("norm_num_groups", default.norm_num_groups),
        batch_norm_eps=config.number("batch_norm_eps", default.batch_norm_eps),
        use_quant_conv=config.flag("use_quant_conv", default.use_quant_conv),
        use_post_quant_conv=config.flag("use_post_quant_conv", default.use_post_quant_conv),
        mid_block_add_attention=config.flag("mid_block_add_attention", default.mid_block_add_attention),
        sample_size=config.integer("sample_size", default.sample_size),
    )
    _check_widths(path, read)
    if read.sample_size % _TILE_MULTIPLE_PX or read.sample_size < 2 * _TILE_MULTIPLE_PX:
        needed = f"it must be a multiple of {_TILE_MULTIPLE_PX}, at least {2 * _TILE_MULTIPLE_PX}"
        raise config.error("sample_size", read.sample_size, needed)
    return read


def _check_widths(path: Path, read: VaeConfig) -> None:
    """Rejects level widths of the wrong number, or that the groups of the norms do not divide."""
    for key, widths in (
        ("block_out_channels", read.block_out_channels),
        ("decoder_block_out_channels", read.decoder_block_out_channels),
    ):
        if widths is not None and (
            len(widths) != config_keys.VAE_LEVELS or any(width % read.norm_num_groups for width in widths)
        ):
            raise CheckpointError(
                f"{path}: {key} is {list(widths)}; it must be {config_keys.VAE_LEVELS} multiples of norm_num_groups "
                f"({read.norm_num_groups})"
            )


def read_noise_schedule(folder: Path | str) -> NoiseSchedule:
    """Reads `scheduler/scheduler_config.json`; a missing key means what it means to diffusers.

    The constants of the dynamic shift are not in the file but in the sampler.

    Raises:
        CheckpointError: as `read_variant`.
    """
    config = ConfigFile.read(Path(folder) / SCHEDULER_FOLDER / "scheduler_config.json")
    config.require_class(_CLASSES[SCHEDULER_FOLDER])
    config.require_only(config_keys.SCHEDULER.fixed)
    kind = config.values.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise config.error("time_shift_type", kind, "it must be 'exponential' or 'linear'")
    return NoiseSchedule(
        is_dynamic=config.flag("use_dynamic_shifting", False),
        shift=config.number("shift", 1.0),
        is_linear=kind == "linear",
    )


def _check_fit(files: ModelFiles, variant: Variant) -> None:
    """Rejects components of different models."""
    transformer, text_encoder = files.path(TRANSFORMER), files.path(TEXT_ENCODER)
    if variant.transformer.in_channels != variant.vae.packed_channels:
        raise CheckpointError(
            f"{transformer} takes {variant.transformer.in_channels} latent channels "
            f"but the VAE {files.path(VAE)} makes {variant.vae.packed_channels}"
        )
    if variant.transformer.joint_attention_dim != variant.text_encoder.embedding_channels:
        raise CheckpointError(
            f"{transformer} takes {variant.transformer.joint_attention_dim} text channels "
            f"but the text encoder {text_encoder} makes {variant.text_encoder.embedding_channels} "
            f"from layers {list(variant.text_encoder.tapped_layers)}"
        )


def refuse_other_family(files: ModelFiles) -> None:
    """Raises CheckpointError when `model_index.json` has the pipeline class of another family of models.

    Every stage calls it, whatever part of the model it loads: the parts of FLUX.2 [dev] have the classes of [klein]'s.
    """
    path = files.index_path
    if path is None or not path.is_file():
        return
    name = read_json(path).get("_class_name")
    if isinstance(name, str) and other_family(name) is not None:
        check_class(path, "_class_name", name, _PIPELINES)
