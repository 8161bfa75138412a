"""Export of the trained parts as a checkpoint in the diffusers folder layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM, Qwen3Model

from klein_core.checkpoint.key_maps import checkpoint_names
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.model_description import FILE_NAME
from klein_core.vae_decoder.autoencoder import Autoencoder
from training.pico.reading import SEQUENCE_LENGTH, TAPPED_LAYERS, configuration
from training.pico.words import subject_words
from training.pico.world import COLORS, PLACES, SHAPES, SIZES

_DIFFUSERS = "0.37.0"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
MODEL_INDEX: dict[str, Any] = {
    "_class_name": "Flux2KleinPipeline",
    "_diffusers_version": _DIFFUSERS,
    "is_distilled": True,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "Qwen2TokenizerFast"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}
DESCRIPTION: dict[str, Any] = {
    "description": (
        "pico draws flat shapes and edits images of them; it is no general image model. Shapes: "
        f"{', '.join(SHAPES)}. Colors: {', '.join(COLORS)}. Places: {', '.join(PLACES)}. Sizes: {', '.join(SIZES)}. "
        "An image has none, one or two shapes on a plain background or on a vertical gradient of two colors. Edits of "
        "one reference: another color, shape, background, place or size; add or remove a shape. Two references: put "
        "the object of image 1 on the background of image 2 or give it the color of image 2, or put both objects side "
        "by side or one above the other. Prompts are English; images have sides of 64 to 256 pixels."
    ),
    "default_size_px": 128,
    "pixel_count": 256 * 256,
    "subject_words": list(subject_words()),
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": _DIFFUSERS,
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}


def export(
    folder: Path,
    tokenizer: Path,
    encoder: Qwen3Model,
    transformer: FlowTransformer,
    autoencoder: Autoencoder,
) -> None:
    """Writes all five parts in single precision, the model index and the description.

    Args:
        folder: the checkpoint; files of the same names are replaced.
        tokenizer: a finished tokenizer folder, copied as it is.
        encoder: Qwen3 up to its last tapped layer.
        transformer: the flow transformer.
        autoencoder: with its final latent statistics.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "model_index.json", MODEL_INDEX)
    _write_json(folder / FILE_NAME, DESCRIPTION)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    _export_encoder(folder / "text_encoder", encoder)
    _export_transformer(folder / "transformer", transformer)
    _export_autoencoder(folder / "vae", autoencoder)


@torch.no_grad()
def _export_encoder(folder: Path, encoder: Qwen3Model) -> None:
    """Puts the untapped last layer and the final norm back, which stock pipelines expect to find."""
    config = configuration()
    config.architectures = ["Qwen3ForCausalLM"]
    config.update({"text_encoder_out_layers": list(TAPPED_LAYERS), "max_sequence_length": SEQUENCE_LENGTH})
    torch.manual_seed(0)
    whole = Qwen3ForCausalLM(config)
    trained = {f"model.{name}": tensor for name, tensor in encoder.state_dict().items()}
    wanted = whole.state_dict()
    whole.load_state_dict({name: trained.get(name, tensor) for name, tensor in wanted.items()})
    whole.save_pretrained(folder, safe_serialization=True)


def _export_transformer(folder: Path, transformer: FlowTransformer) -> None:
    config = transformer.config
    fused = checkpoint_names(config)
    tensors: dict[str, Tensor] = {}
    for name, tensor in transformer.state_dict().items():
        parts = fused.get(name, (name,))
        for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True):
            tensors[part] = piece.contiguous().clone()
    values = {
        "_class_name": "Flux2Transformer2DModel",
        "_diffusers_version": _DIFFUSERS,
        "attention_head_dim": config.attention_head_dim,
        "axes_dims_rope": list(config.axes_dims_rope),
        "eps": config.eps,
        "guidance_embeds": False,
        "in_channels": config.in_channels,
        "joint_attention_dim": config.joint_attention_dim,
        "mlp_ratio": config.mlp_ratio,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "num_single_layers": config.num_single_layers,
        "out_channels": None,
        "patch_size": 1,
        "rope_theta": int(config.rope_theta),
        "timestep_guidance_channels": config.timestep_guidance_channels,
    }
    _write_json(folder / "config.json", values)
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})


def _export_autoencoder(folder: Path, autoencoder: Autoencoder) -> None:
    config = autoencoder.config
    levels = len(config.block_out_channels)
    values = {
        "_class_name": "AutoencoderKLFlux2",
        "_diffusers_version": _DIFFUSERS,
        "act_fn": "silu",
        "batch_norm_eps": config.batch_norm_eps,
        "batch_norm_momentum": 0.1,
        "block_out_channels": list(config.block_out_channels),
        "decoder_block_out_channels": list(config.decoder_block_out_channels or config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_add_attention": config.mid_block_add_attention,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.out_channels,
        "patch_size": list(config.patch_size),
        "sample_size": config.sample_size,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": config.use_post_quant_conv,
        "use_quant_conv": config.use_quant_conv,
    }
    _write_json(folder / "config.json", values)
    save_file(_contiguous(autoencoder), folder / _WEIGHTS, metadata={"format": "pt"})


def _contiguous(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.contiguous(memory_format=torch.contiguous_format).clone()
        for name, tensor in module.state_dict().items()
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
