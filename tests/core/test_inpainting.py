"""Masked edits against diffusers' inpainting pipeline, and what lies outside the mask."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinInpaintPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image, ImageDraw

from klein_core.denoiser.inpainting import first_step
from klein_core.errors import InvalidInput
from klein_core.params import Expansion, inpainting_violations
from klein_core.pipeline import Pipeline
from klein_core.vae_decoder.initial_image import prepare_initial_image
from tests.tiny.checkpoint import save_tiny_checkpoint

PROMPT = "a red circle on a blue background"


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


def rectangle(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


def soft(size: tuple[int, int]) -> Image.Image:
    return Image.linear_gradient("L").resize(size)


def png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


class Pair:
    """A tiny checkpoint, loaded by diffusers' inpainting pipeline and by us."""

    def __init__(self, folder: Path, *, distilled: bool) -> None:
        made = save_tiny_checkpoint(folder, distilled=distilled)
        self.oracle = Flux2KleinInpaintPipeline(**made.components, is_distilled=distilled)
        self.oracle.set_progress_bar_config(disable=True)
        self.ours = Pipeline.from_folder(folder)

    def expected(
        self,
        image: Image.Image,
        mask: Image.Image,
        *,
        seed: int,
        steps: int,
        strength: float,
        reference: Image.Image | None = None,
        **options: Any,
    ) -> np.ndarray:
        config = self.ours.text_encoder.config
        images = self.oracle(
            prompt=PROMPT,
            image=image,
            mask_image=mask,
            image_reference=reference,
            strength=strength,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            max_sequence_length=config.sequence_length,
            text_encoder_out_layers=config.tapped_layers,
            **options,
        ).images
        return np.asarray(images[0])


@pytest.fixture(scope="module", params=[True, False], ids=["distilled", "base"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("checkpoint"), distilled=request.param)


def assert_within_a_level(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


SIZES = [(96, 64), (101, 70), (128, 130)]


@pytest.mark.parametrize(("steps", "strength"), [(1, 0.2), (4, 0.2), (4, 1.0), (7, 0.5), (3, 0.8)])
def test_a_masked_edit_equals_diffusers(pair: Pair, strength: float, steps: int):
    size = SIZES[steps % 3]
    image, mask = noise(*size, seed=steps), rectangle(size, (20, 10, 60, 50))
    options = {} if pair.ours.is_distilled else {"guidance_scale": 2.5}
    expected = pair.expected(image, mask, seed=3, steps=steps, strength=strength, **options)
    [found] = pair.ours.generate(
        PROMPT,
        initial_image=png(image),
        mask=png(mask),
        strength=strength,
        preserve_unmasked=False,
        seeds=(3,),
        step_count=steps,
        **options,
    )
    assert_within_a_level(found.numpy(), expected)


@pytest.mark.parametrize("mask_kind", ["soft", "white", "of another size"])
def test_masks_and_references_equal_diffusers(pair: Pair, mask_kind: str):
    image, reference = noise(112, 80, 1), None if mask_kind == "white" else noise(75, 90, 2)
    mask = {
        "soft": soft((112, 80)),
        "white": Image.new("L", (112, 80), 255),
        "of another size": rectangle((224, 160), (30, 40, 100, 120)),
    }[mask_kind]
    options = {} if pair.ours.is_distilled else {"guidance_scale": 2.5}
    expected = pair.expected(image, mask, seed=5, steps=4, strength=0.7, reference=reference, **options)
    [found] = pair.ours.generate(
        PROMPT,
        initial_image=png(image),
        mask=None if mask_kind == "white" else png(mask),
        references=[png(reference)] if reference else [],
        strength=0.7,
        preserve_unmasked=False,
        seeds=(5,),
        step_count=4,
        **options,
    )
    assert_within_a_level(found.numpy(), expected)


@pytest.mark.parametrize(
    ("padding", "box"), [(0, (20, 10, 60, 50)), (16, (70, 5, 90, 60)), (5, (0, 0, 5, 3))]
)
def test_a_padded_crop_equals_diffusers(
    pair: Pair, padding: int, box: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
):
    # Flux2ImageProcessor cuts the made image's center out instead of scaling it into its place; the base class scales.
    monkeypatch.setattr(Flux2ImageProcessor, "_resize_and_crop", VaeImageProcessor._resize_and_crop)
    image, mask = noise(101, 70, 4), rectangle((101, 70), box)
    expected = pair.expected(image, mask, seed=1, steps=3, strength=0.9, padding_mask_crop=padding)
    [found] = pair.ours.generate(
        PROMPT,
        initial_image=png(image),
        mask=png(mask),
        mask_padding_px=padding,
        strength=0.9,
        guidance_scale=None if pair.ours.is_distilled else 8.0,
        seeds=(1,),
        step_count=3,
    )
    assert_within_a_level(found.numpy(), expected)


def test_outside_the_mask_are_the_images_own_pixels(pair: Pair):
    image, mask = noise(96, 64), rectangle((96, 64), (32, 16, 63, 47))
    [found] = pair.ours.generate(PROMPT, initial_image=png(image), mask=png(mask), step_count=2)
    kept = np.asarray(mask) == 0
    assert np.array_equal(found.numpy()[kept], np.asarray(image)[kept])
    assert not np.array_equal(found.numpy()[~kept], np.asarray(image)[~kept])


def test_an_expanded_image_keeps_its_pixels_where_they_were_put(pair: Pair):
    image = noise(64, 64)
    [found] = pair.ours.generate(
        PROMPT, initial_image=png(image), expand=Expansion(left=32, top=16), strength=1.0, step_count=2
    )
    assert found.shape == (80, 96, 3)
    assert np.array_equal(found.numpy()[16:, 32:], np.asarray(image))


def test_a_mask_may_be_an_alpha_channel(pair: Pair):
    image, mask = noise(96, 64), rectangle((96, 64), (32, 16, 63, 47))
    with_alpha = image.copy()
    with_alpha.putalpha(Image.eval(mask, lambda value: 255 - value))
    by_alpha, by_white = (
        next(iter(pair.ours.generate(PROMPT, initial_image=png(image), step_count=2, **options)))
        for options in ({"mask": png(with_alpha), "mask_is_alpha": True}, {"mask": png(mask)})
    )
    assert torch.equal(by_alpha, by_white)


@pytest.mark.parametrize(
    ("steps", "strength", "first"), [(4, 1.0, 0), (4, 0.5, 2), (4, 0.2, 3), (50, 0.8, 10)]
)
def test_strength_leaves_the_last_steps(steps: int, strength: float, first: int):
    assert first_step(steps, strength) == first


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, float("nan")])
def test_strength_has_limits(strength: float):
    with pytest.raises(InvalidInput, match="strength"):
        first_step(4, strength)


IMAGE = png(noise(96, 64))


@pytest.mark.parametrize(
    ("arguments", "field", "words"),
    [
        ({"data": b"nothing"}, "initial_image", "not an image"),
        ({"mask": b"nothing"}, "mask", "not an image"),
        ({"mask": png(Image.new("L", (96, 64), 0))}, "mask", "empty"),
        ({"mask": png(Image.new("L", (96, 64), 127))}, "mask", "empty"),
        ({"mask": png(rectangle((960, 640), (5, 5, 6, 6)))}, "mask", "too small"),
        ({"mask": png(rectangle((96, 64), (0, 0, 1, 1)))}, "mask", "too small"),
        ({"mask": png(Image.new("L", (64, 96), 255))}, "mask", "aspect"),
        ({"mask": png(Image.new("L", (96, 64), 255)), "mask_is_alpha": True}, "mask", "alpha channel"),
        ({"expand": Expansion(left=10**6)}, "expand", "at most"),
        ({"expand": Expansion(left=600)}, "expand", "times the other"),
    ],
)
def test_bad_input_is_refused_by_name(arguments: dict[str, Any], field: str, words: str):
    with pytest.raises(InvalidInput) as caught:
        prepare_initial_image(**({"data": IMAGE} | arguments))
    [violation] = caught.value.violations
    assert violation.field == field
    assert words in violation.description


FIELDS = {
    "has_initial_image": True,
    "has_mask": True,
    "strength": None,
    "mask_padding_px": None,
    "expand": Expansion(),
    "has_size": False,
}


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, []),
        ({"strength": 1.0, "mask_padding_px": 1024, "expand": Expansion(1, 2, 3, 4)}, []),
        (
            {"has_initial_image": False, "strength": 0.5, "mask_padding_px": 1, "expand": Expansion(1)},
            ["mask", "strength", "mask_padding_px", "expand"],
        ),
        ({"strength": 0.0, "has_size": True}, ["width_px", "strength"]),
        ({"strength": float("nan")}, ["strength"]),
        ({"mask_padding_px": 1025}, ["mask_padding_px"]),
        ({"mask_padding_px": -1, "has_mask": False}, ["mask_padding_px", "mask_padding_px"]),
        ({"expand": Expansion(bottom=-1)}, ["expand"]),
    ],
)
def test_fields_that_contradict_each_other_are_all_named(fields: dict[str, Any], names: list[str]):
    assert [violation.field for violation in inpainting_violations(**(FIELDS | fields))] == names
