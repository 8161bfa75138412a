"""The whole pipeline against diffusers': the same pixels for every flow."""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

from klein_core.errors import InvalidInput
from klein_core.model_description import ModelDescription
from klein_core.params import Limits
from klein_core.pipeline import Pipeline
from tests.tiny.checkpoint import save_tiny_checkpoint

PROMPT = "a red circle on a blue background"


class Pair:
    """A tiny checkpoint, loaded by diffusers and by us."""

    def __init__(self, folder: Path, **checkpoint: Any) -> None:
        self.oracle = save_tiny_checkpoint(folder, **checkpoint)
        self.oracle.set_progress_bar_config(disable=True)
        self.ours = Pipeline.from_folder(folder)

    def oracle_image(
        self,
        *,
        seed: int,
        references: list[Image.Image],
        step_count: int,
        negative_prompt: str | None = None,
        **options,
    ) -> np.ndarray:
        config = self.ours.text_encoder.config
        taps, length = config.tapped_layers, config.sequence_length
        if negative_prompt is not None:
            options["negative_prompt_embeds"] = self.oracle.encode_prompt(
                negative_prompt, max_sequence_length=length, text_encoder_out_layers=taps
            )[0]
        images = self.oracle(
            prompt=PROMPT,
            image=references or None,
            num_inference_steps=step_count,
            generator=torch.Generator().manual_seed(seed),
            max_sequence_length=length,
            text_encoder_out_layers=taps,
            **options,
        ).images
        return np.asarray(images[0])


def png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def pictures(count: int) -> list[Image.Image]:
    """Returns noise images of different sizes, none of them a multiple of 16 on both sides."""
    sizes = [(96, 64), (70, 150), (128, 101)]
    draw = np.random.default_rng(7)
    return [
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in sizes[:count]
    ]


@pytest.fixture(scope="module", params=[True, False], ids=["distilled", "base"])
def pair(request, tmp_path_factory) -> Pair:
    return Pair(tmp_path_factory.mktemp("checkpoint"), distilled=request.param)


@pytest.mark.parametrize("reference_count", [0, 1, 3])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (160, 96), (None, None)])
def test_images_equal_those_of_diffusers(
    pair: Pair, reference_count: int, width: int | None, height: int | None
):
    if reference_count == 0 and width is None:
        width, height = 112, 112
    references = pictures(reference_count)
    options = {} if pair.ours.is_distilled else {"guidance_scale": 3.0, "negative_prompt": "dull"}
    expected = pair.oracle_image(
        seed=5, references=references, step_count=3, width=width, height=height, **options
    )
    [image] = pair.ours.generate(
        PROMPT,
        references=[png(reference) for reference in references],
        width_px=width,
        height_px=height,
        seeds=[5],
        step_count=3,
        **options,
    )
    assert image.shape == expected.shape
    assert np.ptp(expected) > 50, "a flat image would prove nothing"
    assert np.abs(image.numpy().astype(int) - expected.astype(int)).max() <= 1


def test_defaults_are_the_models(pair: Pair):
    steps: list[tuple[int, int, int]] = []
    images = pair.ours.generate(PROMPT, width_px=64, height_px=64, on_step=lambda *step: steps.append(step))
    list(images)
    count = 4 if pair.ours.is_distilled else 50
    assert steps == [(0, step, count) for step in range(1, count + 1)]


@pytest.mark.parametrize(
    ("distilled", "options", "decibels"),
    # Guidance takes the difference of two predictions four times: roundings count up to 4 + 3 times, 17 dB.
    [(True, {}, 45), (False, {"guidance_scale": 4.0, "negative_prompt": "dull"}, 38)],
    ids=["distilled", "base"],
)
def test_bf16_is_close_to_diffusers_in_bf16(
    tmp_path: Path, distilled: bool, options: dict[str, Any], decibels: float
):
    pair = Pair(tmp_path, distilled=distilled, dtype=torch.bfloat16)
    size = {"width": 128, "height": 96}
    expected = pair.oracle_image(seed=5, references=pictures(1), step_count=4, **size, **options)
    [image] = pair.ours.generate(
        PROMPT,
        references=[png(pictures(1)[0])],
        width_px=128,
        height_px=96,
        seeds=[5],
        step_count=4,
        **options,
    )
    error = np.square(image.numpy().astype(float) - expected.astype(float)).mean()
    assert 10 * np.log10(255**2 / max(error, 1e-9)) >= decibels


def test_each_seed_gives_the_image_it_gives_alone(pair: Pair):
    together = list(pair.ours.generate(PROMPT, width_px=64, height_px=80, seeds=[3, 9], step_count=2))
    alone = [
        image
        for seed in (3, 9)
        for image in pair.ours.generate(PROMPT, width_px=64, height_px=80, seeds=[seed], step_count=2)
    ]
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
    assert not torch.equal(*together)


def test_every_violation_is_named_at_once(pair: Pair):
    with pytest.raises(InvalidInput) as caught:
        list(pair.ours.generate(PROMPT, width_px=100, height_px=16, seeds=[-1], step_count=0))
    assert {violation.field for violation in caught.value.violations} == {
        "width_px",
        "height_px",
        "seed",
        "step_count",
    }


def test_too_many_references_are_refused_before_any_is_decoded(pair: Pair):
    with pytest.raises(InvalidInput, match="at most 1"):
        list(pair.ours.generate(PROMPT, references=[b"junk", b"junk"], limits=Limits(reference_count=1)))


def test_every_bad_reference_is_named_at_once(pair: Pair):
    with pytest.raises(InvalidInput) as caught:
        list(pair.ours.generate(PROMPT, references=[b"junk", png(pictures(1)[0]), b""]))
    assert [violation.field for violation in caught.value.violations] == ["references[0]", "references[2]"]


def test_distilled_models_refuse_guidance_and_negative_prompts(pair: Pair):
    arguments = {
        "width_px": 64,
        "height_px": 64,
        "guidance_scale": 2.0,
        "negative_prompt": "dull",
        "step_count": 1,
    }
    if pair.ours.is_distilled:
        with pytest.raises(InvalidInput) as caught:
            list(pair.ours.generate(PROMPT, **arguments))
        assert {violation.field for violation in caught.value.violations} == {
            "guidance_scale",
            "negative_prompt",
        }
    else:
        assert len(list(pair.ours.generate(PROMPT, **arguments))) == 1


def test_files_are_the_images(pair: Pair):
    arguments = {"width_px": 80, "height_px": 64, "step_count": 1, "seeds": [1]}
    [image] = pair.ours.generate(PROMPT, **arguments)
    [file] = pair.ours.generate_files(PROMPT, image_format="png", **arguments)
    assert np.array_equal(np.asarray(Image.open(BytesIO(file))), image.numpy())


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"image_format": "webp", "width_px": 16_400, "height_px": 64}, "width_px"),
        ({"image_format": "tiff"}, "format"),
        ({"image_format": "png", "quality": 50}, "quality"),
    ],
)
def test_files_that_cannot_be_written_are_refused_before_anything_is_computed(
    pair: Pair, arguments: dict[str, Any], field: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Pipeline, "generate", lambda *_, **__: pytest.fail("was computed"))
    with pytest.raises(InvalidInput) as caught:
        pair.ours.generate_files(PROMPT, **arguments)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_the_models_description_gives_the_default_size_and_a_limit(pair: Pair):
    described = replace(pair.ours, description=ModelDescription("Draws.", 80, 96 * 96))
    [image] = described.generate(PROMPT, step_count=1)
    assert image.shape == (80, 80, 3)
    [image] = described.generate(PROMPT, references=[png(pictures(3)[2])], step_count=1)
    assert image.shape == (80, 112, 3)
    with pytest.raises(InvalidInput, match="at most 9216 are allowed"):
        list(described.generate(PROMPT, width_px=112, height_px=96, step_count=1))
    [image] = described.generate(PROMPT, limits=Limits(pixel_count=64 * 64), step_count=1)
    assert image.shape == (64, 64, 3)


def test_a_longer_prompt_is_allowed_by_setting(pair: Pair):
    arguments = {"width_px": 64, "height_px": 64, "step_count": 1}
    longer = Limits(prompt_characters=40_000)
    assert len(list(pair.ours.generate("x" * 40_000, limits=longer, **arguments))) == 1


@pytest.mark.parametrize(
    "scheduler",
    [{}, {"shift": 3.0}, {"use_dynamic_shifting": True, "time_shift_type": "linear"}],
    ids=["diffusers' defaults", "static", "linear"],
)
def test_the_checkpoints_own_schedule_is_honored(tmp_path: Path, scheduler: dict[str, Any]):
    save_tiny_checkpoint(tmp_path)
    (tmp_path / "scheduler/scheduler_config.json").write_text(
        json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler})
    )
    oracle, ours = Flux2KleinPipeline.from_pretrained(tmp_path), Pipeline.from_folder(tmp_path)
    oracle.set_progress_bar_config(disable=True)
    config = ours.text_encoder.config
    expected = oracle(
        prompt=PROMPT,
        width=64,
        height=64,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(3),
        max_sequence_length=config.sequence_length,
        text_encoder_out_layers=config.tapped_layers,
    ).images[0]
    [found] = ours.generate(PROMPT, width_px=64, height_px=64, step_count=4, seeds=(3,))
    assert np.abs(found.numpy().astype(int) - np.asarray(expected).astype(int)).max() <= 1
