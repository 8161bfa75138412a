"""Configurations of a model: shapes of its components and sampling defaults. Torch-free.

Source of the values: the published `config.json` files. Every default is klein's, so a checkpoint need not repeat it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klein_core.errors import CheckpointError


@dataclass(frozen=True)
class TextEncoderConfig:
    """Qwen3's shape, and the layers that the pipeline taps."""

    qwen3: dict[str, Any]
    """The text encoder's `config.json` (Hugging Face names)."""
    tapped_layers: tuple[int, ...] = (9, 18, 27)
    """Hidden states that are concatenated on the channel axis: `k` is the output of the first `k` layers."""
    sequence_length: int = 512
    """Tokens of every prompt after padding or truncation."""

    @property
    def hidden_size(self) -> int:
        return int(self.qwen3["hidden_size"])

    @property
    def embedding_channels(self) -> int:
        """Channels of a prompt embedding: the tapped layers, concatenated."""
        return self.hidden_size * len(self.tapped_layers)


@dataclass(frozen=True)
class TransformerConfig:
    """The flow transformer's shape (`transformer/config.json`)."""

    num_layers: int
    """Double-stream blocks."""
    num_single_layers: int
    """Single-stream blocks."""
    num_attention_heads: int
    attention_head_dim: int = 128
    joint_attention_dim: int = 7680
    """Channels of the prompt embedding."""
    in_channels: int = 128
    """Channels of a packed latent token."""
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000.0
    timestep_guidance_channels: int = 256
    eps: float = 1e-6

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True)
class VaeConfig:
    """The autoencoder's shape (`vae/config.json`)."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None
    """The decoder's widths; `None` means the encoder's."""
    layers_per_block: int = 2
    latent_channels: int = 32
    norm_num_groups: int = 32
    in_channels: int = 3
    out_channels: int = 3
    batch_norm_eps: float = 1e-4
    patch_size: tuple[int, int] = (2, 2)
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    sample_size: int = 1024
    """Side of a tile in pixels, for tiled decoding and encoding."""

    @property
    def packed_channels(self) -> int:
        """Channels of one latent token after patchifying."""
        return self.latent_channels * self.patch_size[0] * self.patch_size[1]


@dataclass(frozen=True)
class NoiseSchedule:
    """Shift of the noise levels of a trajectory, as `scheduler/scheduler_config.json` declares it.

    The defaults are those of the published klein models, and of files without a scheduler. diffusers' own default for
    a missing `use_dynamic_shifting` is false.
    """

    is_dynamic: bool = True
    """Whether the shift depends on the image's token count (`use_dynamic_shifting`)."""
    shift: float = 3.0
    """The shift where it is not dynamic."""
    is_linear: bool = False
    """Whether a dynamic shift is mu itself and not exp(mu) (`time_shift_type`)."""


PUBLISHED_SCHEDULE = NoiseSchedule()


@dataclass(frozen=True)
class Variant:
    """One model: the shapes of its three components and its sampling defaults."""

    text_encoder: TextEncoderConfig
    transformer: TransformerConfig
    vae: VaeConfig
    is_distilled: bool
    uses_reference_cache: bool = False
    """Whether references see only each other, at timestep 0, so that their keys and values can be kept."""
    schedule: NoiseSchedule = PUBLISHED_SCHEDULE

    @property
    def default_step_count(self) -> int:
        return default_step_count(self.is_distilled)

    @property
    def default_guidance_scale(self) -> float:
        return default_guidance_scale(self.is_distilled)


def default_step_count(is_distilled: bool) -> int:
    """Returns 4 steps for distilled models and 50 for base models (source: the model cards)."""
    return 4 if is_distilled else 50


def default_guidance_scale(is_distilled: bool) -> float:
    """Returns 1 (no guidance) for distilled models and 4 for base models."""
    return 1.0 if is_distilled else 4.0


def read_json(path: Path) -> dict[str, Any]:
    """Reads one JSON file of a checkpoint.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: is {path.parent} part of a diffusers folder?") from None
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value
