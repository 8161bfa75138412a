"""Parts of different dtypes: the pixels of diffusers with explicit casts between the parts, as its users write them."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from klein_core.denoiser.sampler import received
from klein_core.errors import InvalidInput
from klein_core.pipeline import Pipeline
from klein_core.vae_decoder.decoder import VaeDecoder
from tests.core.test_autoencoder import ours
from tests.core.test_pipeline import PROMPT, pictures, png
from tests.tiny.checkpoint import save_tiny_checkpoint
from tests.tiny.vae import tiny_vae

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
PARTS = ("text_encoder", "transformer", "vae")
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}
MIXES = [*product((FP32, BF16), repeat=3), (FP16, FP32, FP32), (FP32, FP16, FP32)]
"""Not a VAE in fp16: torch convolves that on a CPU for 20 s a case."""


@torch.no_grad()
def oracle_image(
    oracle: Flux2KleinPipeline, references: list[Image.Image], *, seed: int, step_count: int
) -> np.ndarray:
    config = oracle.text_encoder.config
    embedding = oracle.encode_prompt(
        PROMPT,
        max_sequence_length=config.max_sequence_length,
        text_encoder_out_layers=config.text_encoder_out_layers,
    )[0]
    latents = oracle(
        prompt_embeds=embedding.to(oracle.transformer.dtype),
        image=references or None,
        width=80,
        height=64,
        num_inference_steps=step_count,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images
    image = oracle.vae.decode(latents.to(oracle.vae.dtype)).sample
    return np.asarray(oracle.image_processor.postprocess(image)[0])


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(NAMES[each] for each in mix))
def test_images_equal_diffusers_with_casts(tmp_path: Path, mix: tuple[torch.dtype, ...]) -> None:
    oracle = save_tiny_checkpoint(tmp_path, part_dtypes=dict(zip(PARTS, mix, strict=True)))
    oracle.set_progress_bar_config(disable=True)
    pipeline = Pipeline.from_folder(tmp_path)
    embedding = pipeline.text_encoder.encode([PROMPT])[0].embedding
    assert (embedding.dtype, pipeline.transformer.dtype, pipeline.vae_decoder.dtype) == mix
    # bf16 has 8 significant bits, as many as a pixel, and sums round in another order than in diffusers: up to 3
    # levels and 53 dB were measured. Noise of another dtype would be another image, at 10 dB.
    rounds = BF16 in mix[1:]
    for reference_count in (0, 1):
        references = pictures(reference_count)
        expected = oracle_image(oracle, references, seed=5, step_count=4)
        [image] = pipeline.generate(
            PROMPT,
            references=[png(reference) for reference in references],
            width_px=80,
            height_px=64,
            seeds=[5],
            step_count=4,
        )
        assert np.ptp(expected) > 50, "a flat image would prove nothing"
        difference = np.abs(image.numpy().astype(int) - expected.astype(int))
        assert difference.max() <= (4 if rounds else 1)
        assert np.square(difference).mean() <= 255**2 / 10 ** (4.8 if rounds else 5.8)


@pytest.mark.parametrize("dtypes", [(BF16, FP32), (FP16, FP32)], ids=lambda each: str(each))
@torch.no_grad()
def test_latents_are_denormalized_in_their_own_dtype(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    sent, held = dtypes
    vae = tiny_vae().to(held)
    latents = torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(2)).to(sent)
    mean = vae.bn.running_mean.view(1, -1, 1, 1).to(sent)
    deviation = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(sent)
    packed = latents.permute(2, 0, 1).unsqueeze(0) * deviation + mean
    unpacked = Flux2KleinPipeline._unpatchify_latents(packed)
    expected = VaeImageProcessor().postprocess(vae.decode(unpacked.to(held)).sample)[0]
    found = VaeDecoder(ours(vae).to(held)).decode(latents)
    difference = np.abs(found.numpy().astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= 1
    # Latents that are cast first differ in 8 % (bf16) and 0.7 % (fp16) of all values, by one level.
    assert np.count_nonzero(difference) <= 0.001 * difference.size


def test_inputs_that_the_transformers_dtype_cannot_hold_are_refused() -> None:
    tensor = torch.tensor([1.0, -1e5])
    assert received(tensor, BF16, "prompt_embedding").dtype is BF16
    with pytest.raises(InvalidInput, match=r"prompt_embedding.* ±65504, the range of float16"):
        received(tensor, FP16, "prompt_embedding")
    with pytest.raises(InvalidInput, match="NaN or infinity"):
        received(torch.tensor([float("nan")]), FP16, "prompt_embedding")
