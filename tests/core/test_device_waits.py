"""No part of a request waits for its device: each runs on `meta`, where reading a value raises."""

from __future__ import annotations

import pytest
import torch

from klein_core.checkpoint.config import read_vae_config
from klein_core.checkpoint.files import ModelFiles
from klein_core.denoiser.packing import Span
from klein_core.pico import WEIGHTS
from klein_core.text_encoder.encoder import TextEncoder, tapped_embedding
from klein_core.vae_decoder.autoencoder import Autoencoder
from tests.services.fakes.denoiser_server import CONFIG, tiny_transformer

MIXES = {
    "one": [(4, 4)],
    "equal": [(4, 4), (4, 4)],
    "unequal": [(4, 4), (6, 2), (3, 3)],
}


def on_meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize("reference_count", [0, 2])
@pytest.mark.parametrize("mix", MIXES)
def test_a_step_does_not_wait(mix: str, reference_count: int) -> None:
    model = tiny_transformer().to("meta")
    channels, references = CONFIG.in_channels, tuple((3, 2) for _ in range(reference_count))
    spans = [
        Span(
            on_meta(7, CONFIG.joint_attention_dim),
            on_meta(rows, columns, channels),
            tuple(on_meta(*grid, channels) for grid in references),
        )
        for rows, columns in MIXES[mix]
    ]
    with torch.no_grad():
        velocities = model(spans)
    assert [tuple(each.shape[:2]) for each in velocities] == MIXES[mix]


def test_a_prompt_does_not_wait() -> None:
    encoder = TextEncoder.from_folder(WEIGHTS)
    model, config = encoder.model.to("meta"), encoder.config
    tokens = torch.zeros(2, config.sequence_length, dtype=torch.long, device="meta")
    with torch.no_grad():
        embedding = tapped_embedding(model, tokens, torch.ones_like(tokens), config.tapped_layers)
    assert embedding.shape == (2, config.sequence_length, config.embedding_channels)


@pytest.mark.parametrize("tiled", [False, True])
def test_the_autoencoder_does_not_wait(tiled: bool) -> None:
    with torch.device("meta"):
        autoencoder = Autoencoder(read_vae_config(ModelFiles.of(WEIGHTS)))
    channels = autoencoder.config.packed_channels
    with torch.no_grad():
        assert autoencoder.decode(on_meta(1, channels, 4, 6), tiled=tiled).shape == (1, 3, 64, 96)
        assert autoencoder.encode(on_meta(1, 3, 64, 96), tiled=tiled).shape == (1, channels, 4, 6)
