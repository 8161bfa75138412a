"""Tiling: diffusers' result, in the memory of one tile, only for images that the policy selects."""

from __future__ import annotations

import pytest
import torch

from klein_core.memory.activation_bytes import decode_bytes, encode_bytes
from klein_core.vae_decoder import decoder
from klein_core.vae_decoder.decoder import VaeDecoder, host_memory_bytes
from klein_core.vae_decoder.tiling import AUTOMATIC_TILING, TilingPolicy, decoder_tiles, encoder_tiles
from klein_core.variants import VaeConfig
from tests.core.test_autoencoder import oracle_decode, oracle_encode, ours, relative
from tests.tiny.vae import tiny_vae

# One tile, one and a bit, a tile that starts where the one before already reached the edge, several both ways.
SIZES = [(64, 64), (64, 80), (48, 112), (112, 144)]


@pytest.fixture(scope="module")
def oracle():
    vae = tiny_vae(sample_size=64)
    vae.enable_tiling()
    return vae


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_both_directions_equal_diffusers_tiles(oracle, size):
    autoencoder, (height, width) = ours(oracle), size
    image = torch.rand(1, 3, height, width) * 2 - 1
    expected = oracle_encode(oracle, image)
    assert relative(autoencoder.encode(image, tiled=True), expected) <= 1e-6
    latents = torch.randn(expected.shape)
    expected_image = oracle_decode(oracle, latents)
    assert relative(autoencoder.decode(latents, tiled=True), expected_image) <= 1e-6
    # Tiles show, so the comparison above would notice if there were none.
    is_larger = max(size) > 64
    assert torch.equal(autoencoder.decode(latents), expected_image) is not is_larger


def test_bf16_blends_round_as_diffusers_do():
    oracle = tiny_vae(sample_size=64).to(torch.bfloat16)
    tiles, tile_rows = decoder_tiles(ours(oracle).config), torch.randn(1, 3, 64, 64).to(torch.bfloat16)
    found = torch.randn(1, 3, 64, 48).to(torch.bfloat16)
    expected = oracle.blend_h(tile_rows, found.clone(), tiles.blend)
    tiles._fade_in(tile_rows, found, axis=3)
    assert torch.equal(found, expected)


def test_klein_tiles_are_1024_pixels_and_keep_768():
    decode, encode = decoder_tiles(VaeConfig()), encoder_tiles(VaeConfig())
    assert (decode.side, decode.stride, decode.blend, decode.kept) == (128, 96, 256, 768)
    assert (encode.side, encode.stride, encode.blend, encode.kept) == (1024, 768, 32, 96)


def test_only_images_above_the_limit_are_tiled(oracle):
    autoencoder = ours(oracle)
    latents = torch.randn(9, 7, 16)
    needed = decode_bytes(autoencoder.config, 112, 144, 4)
    whole = VaeDecoder(autoencoder).decode(latents)
    tiled = VaeDecoder(autoencoder, tiling=TilingPolicy("on")).decode(latents)
    assert not torch.equal(whole, tiled)
    for policy, expected in (
        (TilingPolicy("auto", needed - 1), tiled),
        (TilingPolicy("auto", needed), whole),
        (TilingPolicy("off", 1), whole),
    ):
        assert torch.equal(VaeDecoder(autoencoder, tiling=policy).decode(latents), expected), policy


def test_references_are_tiled_by_what_encoding_takes(oracle):
    autoencoder, image = ours(oracle), torch.rand(96, 80, 3)
    needed = encode_bytes(autoencoder.config, 80, 96, 4)
    tiled, whole = (
        VaeDecoder(autoencoder, tiling=TilingPolicy("auto", limit)).encode(image)
        for limit in (needed - 1, needed)
    )
    assert not torch.equal(tiled, whole)
    assert torch.equal(whole, VaeDecoder(autoencoder).encode(image))


def test_the_devices_memory_decides_only_in_auto_mode_without_a_limit():
    policy = AUTOMATIC_TILING.for_memory(lambda: 8)
    assert policy == TilingPolicy("auto", 2)
    assert (policy.applies(3), policy.applies(2)) == (True, False)
    with pytest.raises(ValueError, match="for_memory"):
        AUTOMATIC_TILING.applies(3)
    for given, expected in (
        (TilingPolicy("auto", 1), True),
        (TilingPolicy("on"), True),
        (TilingPolicy("off"), False),
    ):
        assert given.for_memory(lambda: pytest.fail("memory was measured")) is given
        assert given.applies(2) is expected


def test_the_decision_does_not_change_with_the_memory_of_the_moment(oracle, monkeypatch):
    needed = decode_bytes(ours(oracle).config, 112, 144, 4)
    memory = [4 * needed]
    monkeypatch.setattr(decoder, "memory_bytes", lambda _: memory[0])
    latents = torch.randn(9, 7, 16)
    loaded = VaeDecoder(ours(oracle))
    before = loaded.decode(latents)
    memory[0] = 0
    assert torch.equal(loaded.decode(latents), before)
    assert not torch.equal(VaeDecoder(ours(oracle)).decode(latents), before)


def test_a_containers_limit_counts_where_it_is_the_smaller(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 4000 kB\nMemFree: 10 kB\nMemAvailable: 3000 kB\n")
    assert host_memory_bytes(meminfo, tmp_path) == 4000 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    assert host_memory_bytes(meminfo, tmp_path) == 1_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory_bytes(meminfo, tmp_path) == 4000 * 1024
    assert host_memory_bytes(tmp_path / "none", tmp_path / "none") == 2**63 - 1


@pytest.mark.parametrize(("limit", "expected"), [("2000000", 2_000_000), (str(2**63 - 4096), 4000 * 1024)])
def test_cgroup_1_has_its_limit_in_another_file(tmp_path, limit, expected):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 4000 kB\n")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(limit + "\n")
    assert host_memory_bytes(meminfo, tmp_path) == expected
