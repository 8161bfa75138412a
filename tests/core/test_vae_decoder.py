"""VAE decoder loaded from a folder: files to latents to images, as diffusers' pipeline does."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from klein_core.errors import InvalidInput
from klein_core.vae_decoder.decoder import VaeDecoder
from tests.tiny.checkpoint import save_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, save_tiny_checkpoint(folder, sharded=True)


@pytest.fixture(scope="module")
def stage(checkpoint):
    return VaeDecoder.from_folder(checkpoint[0])


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(("width", "height"), [(64, 64), (150, 100), (79, 200)])
def test_reference_latents_equal_the_pipelines(checkpoint, stage, width, height):
    pipeline, image = checkpoint[1], picture(width, height)
    size = {"width": width // 16 * 16, "height": height // 16 * 16}
    prepared = pipeline.image_processor.preprocess(image, resize_mode="crop", **size)
    expected = pipeline._encode_vae_image(prepared, None)[0].permute(1, 2, 0)
    found = stage.encode_reference(png(image))
    assert (found.width_px, found.height_px) == (size["width"], size["height"])
    assert found.latents.shape == (size["height"] // 16, size["width"] // 16, 16)
    assert (found.latents - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_decoded_bytes_equal_the_pipelines(checkpoint, stage):
    pipeline = checkpoint[1]
    latents = torch.randn(5, 8, 16, generator=torch.Generator().manual_seed(1))
    unpacked = stage.autoencoder.unpack(stage.autoencoder.denormalize(latents.permute(2, 0, 1)[None]))
    decoded = pipeline.vae.decode(unpacked).sample
    expected = np.array(pipeline.image_processor.postprocess(decoded, output_type="pil")[0])
    found = stage.decode(latents)
    assert found.shape == (80, 128, 3)
    assert np.abs(found.numpy().astype(int) - expected).max() <= 1
    assert (found.numpy() != expected).mean() < 0.001
    file = Image.open(BytesIO(stage.decode_image(latents, "png")))
    assert np.array_equal(np.array(file), found.numpy())


def test_dtype_is_the_checkpoints_unless_given(tmp_path):
    save_tiny_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert VaeDecoder.from_folder(tmp_path).dtype == torch.bfloat16
    stage = VaeDecoder.from_folder(tmp_path, dtype=torch.float32)
    assert stage.encode_reference(png(picture(64, 64))).latents.dtype == torch.float32


@pytest.mark.parametrize(
    "latents",
    [
        torch.full((4, 4, 16), float("nan")),
        torch.full((4, 4, 16), float("inf")),
        torch.zeros(4, 4, 12),
        torch.zeros(4, 16),
        torch.zeros(0, 4, 16),
        torch.zeros(4, 4, 16, dtype=torch.int32),
    ],
    ids=["nan", "infinite", "channels", "two axes", "empty", "integers"],
)
def test_bad_latents_are_refused(stage, latents):
    with pytest.raises(InvalidInput) as caught:
        stage.decode(latents)
    assert caught.value.violations[0].field == "latents"


def test_a_bad_reference_is_named_by_the_given_field(stage):
    with pytest.raises(InvalidInput) as caught:
        stage.encode_reference(b"GIF89a", field="references[2]")
    assert caught.value.violations[0].field == "references[2]"


@pytest.mark.parametrize("encoding", [("webp", None, None), ("png", 90, None), ("png", None, {"": "x"})])
def test_what_cannot_be_encoded_is_refused_before_it_is_decoded(stage, encoding, monkeypatch):
    monkeypatch.setattr(stage.autoencoder, "decode", lambda *_, **__: pytest.fail("was decoded"))
    with pytest.raises(InvalidInput):
        stage.decode_image(torch.zeros(1024, 4, 16), *encoding)


def test_convolutions_take_channels_last_on_the_processor(stage):
    assert stage.autoencoder.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_convolutions_take_channels_first_on_a_gpu_as_its_norms_do(checkpoint):
    assert VaeDecoder.from_folder(
        checkpoint[0], device="cuda"
    ).autoencoder.decoder.conv_in.weight.is_contiguous()
