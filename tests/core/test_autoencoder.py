"""Autoencoder against diffusers', and each known mistake in reimplementing it."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2KleinPipeline
from hypothesis import given
from hypothesis import strategies as st

from klein_core.vae_decoder.autoencoder import Autoencoder, Downsampler, fold_patches, unfold_patches
from klein_core.variants import VaeConfig
from tests.tiny.vae import tiny_vae

SHAPES = {
    "small decoder": {},
    "one group, one layer": {
        "block_out_channels": (8, 12, 16, 24),
        "decoder_block_out_channels": None,
        "norm_num_groups": 1,
        "layers_per_block": 1,
    },
    "no optional parts": {
        "block_out_channels": (8, 8, 16, 16),
        "decoder_block_out_channels": (4, 8, 8, 12),
        "norm_num_groups": 2,
        "latent_channels": 8,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    },
}
RECTANGLE = (2, 3, 64, 96)


def ours(oracle) -> Autoencoder:
    fields = {name: oracle.config[name] for name in VaeConfig.__dataclass_fields__}
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    autoencoder = Autoencoder(VaeConfig(**fields)).eval().requires_grad_(False)
    autoencoder.load_state_dict(oracle.state_dict(), strict=True)
    return autoencoder.to(oracle.dtype)


def oracle_statistics(oracle, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = oracle.bn.running_mean.view(1, -1, 1, 1).to(like.dtype)
    return mean, torch.sqrt(oracle.bn.running_var.view(1, -1, 1, 1) + oracle.config.batch_norm_eps).to(
        like.dtype
    )


def oracle_encode(oracle, image: torch.Tensor) -> torch.Tensor:
    packed = Flux2KleinPipeline._patchify_latents(oracle.encode(image).latent_dist.mode())
    mean, deviation = oracle_statistics(oracle, packed)
    return (packed - mean) / deviation


def oracle_decode(oracle, latents: torch.Tensor) -> torch.Tensor:
    mean, deviation = oracle_statistics(oracle, latents)
    return oracle.decode(Flux2KleinPipeline._unpatchify_latents(latents * deviation + mean)).sample


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_both_directions_equal_diffusers(shape):
    oracle = tiny_vae(**shape)
    autoencoder = ours(oracle)
    image = torch.rand(RECTANGLE) * 2 - 1
    expected = oracle_encode(oracle, image)
    assert relative(autoencoder.encode(image), expected) <= 1e-5
    latents = torch.randn(expected.shape)
    assert relative(autoencoder.decode(latents), oracle_decode(oracle, latents)) <= 1e-5


def test_bf16_stays_close_to_diffusers_bf16():
    oracle = tiny_vae().to(torch.bfloat16)
    autoencoder = ours(oracle)
    latents = torch.randn(1, 16, 5, 7, dtype=torch.bfloat16)
    found, expected = autoencoder.decode(latents), oracle_decode(oracle, latents)
    assert found.dtype == torch.bfloat16
    error = (found.float() - expected.float()).pow(2).mean()
    assert 10 * torch.log10(4 / error.clamp_min(1e-12)) >= 45
    image = torch.rand(1, 3, 48, 80, dtype=torch.bfloat16) * 2 - 1
    assert relative(autoencoder.encode(image), oracle_encode(oracle, image)) <= 0.02


def test_group_norm_epsilon_shows_at_low_variance():
    oracle = tiny_vae()
    for part in (oracle.encoder, oracle.decoder):
        part.conv_in.weight.mul_(1e-3)
        part.conv_in.bias.zero_()
    autoencoder = ours(oracle)
    image, latents = torch.rand(1, 3, 32, 32), torch.randn(1, 16, 2, 2)
    assert relative(autoencoder.encode(image), oracle_encode(oracle, image)) <= 1e-5
    assert relative(autoencoder.decode(latents), oracle_decode(oracle, latents)) <= 1e-5


def test_latent_statistics_use_their_own_epsilon():
    autoencoder = ours(tiny_vae())
    autoencoder.bn.running_mean.zero_()
    autoencoder.bn.running_var.fill_(3e-4)
    assert torch.allclose(autoencoder.normalize(torch.ones(1, 16, 1, 1)), torch.tensor(1 / 0.02))


def test_downsampling_pads_right_and_bottom_only():
    down = Downsampler(1)
    torch.nn.init.zeros_(down.conv.bias)
    torch.nn.init.zeros_(down.conv.weight)
    down.conv.weight.data[0, 0, 0, 0] = 1
    picture = torch.arange(1.0, 65.0).reshape(1, 1, 8, 8)
    assert torch.equal(down(picture), picture[..., ::2, ::2])


def test_packed_channel_is_channel_then_row_then_column():
    latents = torch.arange(3 * 4 * 6.0).reshape(1, 3, 4, 6)
    packed = fold_patches(latents)
    for channel in range(3):
        for row in range(2):
            for column in range(2):
                expected = latents[:, channel, row::2, column::2]
                assert torch.equal(packed[:, channel * 4 + row * 2 + column], expected)
    assert torch.equal(packed, Flux2KleinPipeline._patchify_latents(latents))


@given(st.tuples(*[st.integers(1, 4)] * 4), st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_unfolding_undoes_folding(shape, patch):
    batch, channels, rows, columns = shape
    latents = torch.randn(batch, channels, rows * patch[0], columns * patch[1])
    assert torch.equal(unfold_patches(fold_patches(latents, patch), patch), latents)


def test_one_image_is_the_same_alone_and_in_a_batch():
    autoencoder = ours(tiny_vae())
    latents = torch.randn(3, 16, 4, 5)
    together = autoencoder.decode(latents)
    alone = torch.cat([autoencoder.decode(one[None]) for one in latents])
    assert relative(together, alone) <= 1e-5


def test_every_parameter_can_be_trained():
    autoencoder = ours(tiny_vae(layers_per_block=1)).requires_grad_(True)
    mean, log_variance = autoencoder.posterior(torch.rand(1, 3, 32, 48))
    image = autoencoder.decode_unpacked(autoencoder.unpack(autoencoder.pack(mean)))
    (image.square().mean() + log_variance.square().mean()).backward()
    assert not [name for name, parameter in autoencoder.named_parameters() if parameter.grad is None]
