"""Honored keys of the transformer's and the VAE's config.json: another value, loaded from files, equals diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from klein_core.checkpoint.config_keys import TRANSFORMER, VAE
from klein_core.denoiser.transformer import FlowTransformer
from klein_core.vae_decoder.decoder import VaeDecoder
from tests.core.test_autoencoder import oracle_decode, oracle_encode, relative
from tests.tiny.transformer import oracle_velocity, random_span, relative_error, save_tiny_transformer
from tests.tiny.vae import tiny_vae

TOLERANCE = 1e-5
OF_TRANSFORMER: dict[str, dict[str, Any]] = {
    "num_layers": {"num_layers": 1},
    "num_single_layers": {"num_single_layers": 1},
    "num_attention_heads": {"num_attention_heads": 3},
    "attention_head_dim": {"attention_head_dim": 24, "axes_dims_rope": (4, 12, 6, 2)},
    "axes_dims_rope": {"axes_dims_rope": (2, 6, 6, 2)},
    "joint_attention_dim": {"joint_attention_dim": 40},
    "in_channels": {"in_channels": 32},
    "out_channels": {"out_channels": 16},
    "mlp_ratio": {"mlp_ratio": 2.0},
    "rope_theta": {"rope_theta": 50},
    "timestep_guidance_channels": {"timestep_guidance_channels": 64},
    "eps": {"eps": 0.1},
}
OF_VAE: dict[str, dict[str, Any]] = {
    "block_out_channels": {"block_out_channels": (32, 64, 32, 64)},
    "decoder_block_out_channels": {"decoder_block_out_channels": (64, 32, 64, 32)},
    "layers_per_block": {"layers_per_block": 1},
    "latent_channels": {"latent_channels": 8},
    "norm_num_groups": {"norm_num_groups": 8},
    "batch_norm_eps": {"batch_norm_eps": 0.5},
    "use_quant_conv": {"use_quant_conv": False},
    "use_post_quant_conv": {"use_post_quant_conv": False},
    "mid_block_add_attention": {"mid_block_add_attention": False},
}


def test_each_key_is_changed() -> None:
    # Quantized weights, classes and the size of tiles have their own tests.
    assert OF_TRANSFORMER.keys() | {"_class_name", "quantization_config"} == TRANSFORMER.honored
    assert OF_VAE.keys() | {"_class_name", "sample_size"} == VAE.honored


@pytest.mark.parametrize("changes", OF_TRANSFORMER.values(), ids=OF_TRANSFORMER)
def test_a_key_of_the_transformer(tmp_path: Path, changes: dict[str, Any]) -> None:
    oracle = save_tiny_transformer(tmp_path, **changes)
    channels = {key: changes[key] for key in ("joint_attention_dim", "in_channels") if key in changes}
    span = random_span([(4, 6), (3, 2)], **channels)
    with torch.no_grad():
        [found] = FlowTransformer.from_folder(tmp_path)([span])
    assert relative_error(found, oracle_velocity(oracle, span)) < TOLERANCE


@pytest.mark.parametrize("changes", OF_VAE.values(), ids=OF_VAE)
def test_a_key_of_the_vae(tmp_path: Path, changes: dict[str, Any]) -> None:
    oracle = tiny_vae(**changes)
    oracle.save_pretrained(tmp_path / "vae")
    network = VaeDecoder.from_folder(tmp_path).autoencoder
    generator = torch.Generator().manual_seed(1)
    image = torch.rand((1, 3, 32, 48), generator=generator) * 2 - 1
    with torch.no_grad():
        latents = oracle_encode(oracle, image)
        assert relative(network.encode(image), latents) <= TOLERANCE
        assert relative(network.decode(latents), oracle_decode(oracle, latents)) <= TOLERANCE
