"""The embedded checkpoint itself: it loads here and in diffusers, it is small, and its images mean something.

Needs a clone: `training/` draws the references.
"""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from klein_core.pico import WEIGHTS
from klein_core.pipeline import Pipeline
from klein_core.text_encoder.tokenizer import PromptTokenizer
from training.pico.measure import nearest_color
from training.pico.reading import SEQUENCE_LENGTH, TAPPED_LAYERS
from training.pico.world import Background, Item, Scene, render

SIDE = 128
MEGABYTES = 25


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_folder(WEIGHTS)


def picture_bytes(scene: Scene) -> bytes:
    file = io.BytesIO()
    Image.fromarray(render(scene, SIDE, SIDE)).save(file, "PNG")
    return file.getvalue()


def color_at(picture: np.ndarray, x: float, y: float) -> str:
    """Names the color of a small patch at fractions of width and height."""
    row, column = int(y * picture.shape[0]), int(x * picture.shape[1])
    patch = picture[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3]
    return nearest_color(np.median(patch.reshape(-1, 3).astype(np.float32), axis=0))


def painted(pipeline: Pipeline, prompt: str, references: tuple[bytes, ...] = ()) -> np.ndarray:
    (picture,) = pipeline.generate(
        prompt, width_px=SIDE, height_px=SIDE, seeds=[1], references=list(references)
    )
    return np.asarray(picture)


def test_the_weights_are_small_and_distilled() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MEGABYTES * 10**6
    assert json.loads((WEIGHTS / "model_index.json").read_text())["is_distilled"] is True


def test_the_text_encoder_configuration_names_its_own_taps_and_length() -> None:
    config = json.loads((WEIGHTS / "text_encoder" / "config.json").read_text())
    assert tuple(config["text_encoder_out_layers"]) == TAPPED_LAYERS
    assert config["max_sequence_length"] == SEQUENCE_LENGTH
    assert config["num_hidden_layers"] > max(TAPPED_LAYERS)


def test_the_chat_template_gives_kleins_text_with_thinking_off() -> None:
    tokenizer = PromptTokenizer.from_folder(WEIGHTS / "tokenizer", SEQUENCE_LENGTH)
    rendered = tokenizer._render("a red circle")
    assert rendered == (
        "<|im_start|>user\na red circle<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


@pytest.mark.parametrize("prompt", ["a red circle", "naïve Schrödinger, 漢字!", "  two  spaces\n", ""])
def test_any_text_survives_the_tokenizer(prompt: str) -> None:
    tokenizer = PromptTokenizer.from_folder(WEIGHTS / "tokenizer", SEQUENCE_LENGTH)
    tokens = tokenizer.tokenize(prompt)
    text = tokenizer._tokenizer.decode(list(tokens.token_ids[: tokens.token_count]))
    assert f"user\n{prompt}<|im_end|>" in text
    assert not tokens.truncated


def test_a_prompt_is_obeyed(pipeline: Pipeline) -> None:
    picture = painted(pipeline, "a red circle on a blue background")
    assert color_at(picture, 0.5, 0.5) == "red"
    assert {color_at(picture, x, y) for x in (0.03, 0.97) for y in (0.03, 0.97)} == {"blue"}


def test_an_edit_changes_what_was_asked_and_keeps_the_rest(pipeline: Pipeline) -> None:
    scene = Scene(Background.plain("white"), (Item("square", "green", "center", "large"),))
    picture = painted(pipeline, "make it red", (picture_bytes(scene),))
    assert color_at(picture, 0.5, 0.5) == "red"
    assert color_at(picture, 0.05, 0.05) == "white"
    other = painted(pipeline, "make the background black", (picture_bytes(scene),))
    assert color_at(other, 0.5, 0.5) == "green"
    assert color_at(other, 0.05, 0.05) == "black"


def test_two_references_are_put_together(pipeline: Pipeline) -> None:
    first = Scene(Background.plain("yellow"), (Item("circle", "red", "center", "large"),))
    second = Scene(Background.plain("white"), (Item("square", "blue", "center", "large"),))
    picture = painted(
        pipeline,
        "put the object of image 1 on the left and the object of image 2 on the right",
        (picture_bytes(first), picture_bytes(second)),
    )
    assert color_at(picture, 0.25, 0.5) == "red"
    assert color_at(picture, 0.75, 0.5) == "blue"
    assert color_at(picture, 0.5, 0.05) == "yellow"


def test_stock_diffusers_paints_the_same_picture(pipeline: Pipeline) -> None:
    diffusers = pytest.importorskip("diffusers")
    stock = diffusers.Flux2KleinPipeline.from_pretrained(str(WEIGHTS))
    stock.set_progress_bar_config(disable=True)
    prompt = "a small yellow star in the top left corner on a black background"
    theirs = stock(
        prompt=prompt,
        width=SIDE,
        height=SIDE,
        num_inference_steps=4,
        generator=torch.Generator("cpu").manual_seed(1),
        max_sequence_length=SEQUENCE_LENGTH,
        text_encoder_out_layers=TAPPED_LAYERS,
    ).images[0]
    difference = np.abs(painted(pipeline, prompt).astype(int) - np.asarray(theirs).astype(int))
    assert difference.max() <= 1
