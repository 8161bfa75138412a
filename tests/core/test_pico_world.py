"""The embedded model's world: images, captions and the measure that judges them. Needs a clone: `training/`."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.pico import scenes
from training.pico.captions import caption
from training.pico.evaluate import BLIND_PARAPHRASES, PARAPHRASES, paraphrase
from training.pico.measure import judge
from training.pico.mixture import FAMILIES, any_training_task
from training.pico.tasks import (
    EDIT_KINDS,
    READING,
    TWO_REFERENCE_KINDS,
    edit,
    text_to_image,
    two_references,
)
from training.pico.words import _COLOR_WORDS
from training.pico.world import (
    COLORS,
    PLACES,
    SHAPES,
    Background,
    Item,
    Scene,
    center_px,
    coverage,
    is_held_out,
    is_in_training,
    radius_px,
    render,
    stands_out,
)

SIDES = st.integers(4, 16).map(lambda tokens: 16 * tokens)
SEEDS = st.integers(0, 2**32)


@given(width=SIDES, height=SIDES, seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_a_true_picture_is_judged_right_at_every_size(width: int, height: int, seed: int) -> None:
    scene = scenes.any_scene(random.Random(seed))
    assert judge(render(scene, width, height), scene).everything


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_a_picture_of_another_scene_is_judged_wrong(seed: int) -> None:
    rng = random.Random(seed)
    scene, other = scenes.any_scene(rng), scenes.any_scene(rng)
    if scene != other:
        assert not judge(render(other, 128, 128), scene).everything


@pytest.mark.parametrize("missed", ["background", "color", "shape", "place", "size"])
def test_each_property_is_judged_by_itself(missed: str) -> None:
    scene = Scene(Background.plain("white"), (Item("star", "red", "left", "medium"),))
    wrong = {
        "background": Scene(Background.plain("yellow"), scene.items),
        "color": Scene(scene.background, (Item("star", "blue", "left", "medium"),)),
        "shape": Scene(scene.background, (Item("heart", "red", "left", "medium"),)),
        "place": Scene(scene.background, (Item("star", "red", "top", "medium"),)),
        "size": Scene(scene.background, (Item("star", "red", "left", "large"),)),
    }[missed]
    judgment = judge(render(wrong, 128, 128), scene)
    judged = {name: getattr(judgment, name) for name in ("background", "color", "shape", "place", "size")}
    assert judged == {name: name != missed for name in judged}


@given(width=SIDES, height=SIDES, place=st.sampled_from(list(PLACES)), shape=st.sampled_from(SHAPES))
@settings(max_examples=30, deadline=None)
def test_the_largest_item_stays_inside_and_on_the_token_grid(
    width: int, height: int, place: str, shape: str
) -> None:
    x, y = center_px(place, width, height)
    radius = radius_px("large", width, height)
    assert (x % 16, y % 16) == (0, 0)
    assert radius <= x <= width - radius
    assert radius <= y <= height - radius
    covered = coverage(Item(shape, "red", place, "large"), width, height)
    rows, columns = np.nonzero(covered > 0.5)
    assert max(abs(rows - y + 0.5).max(), abs(columns - x + 0.5).max()) <= 1.1 * radius


def test_a_picture_depends_on_nothing_but_scene_and_size() -> None:
    scene = scenes.double_scene(random.Random(3))
    assert np.array_equal(render(scene, 96, 144), render(scene, 96, 144))


def test_every_background_leaves_colors_that_stand_out() -> None:
    backgrounds = [Background(top, bottom) for top, bottom in itertools.product(COLORS, repeat=2)]
    fewest = min(sum(stands_out(color, background) for color in COLORS) for background in backgrounds)
    assert fewest >= 3


def test_held_out_combinations_are_few_spread_and_never_practiced() -> None:
    combinations = [Item(*parts) for parts in itertools.product(SHAPES, COLORS, PLACES)]
    held_out = [item for item in combinations if is_held_out(item)]
    assert 0.04 < len(held_out) / len(combinations) < 0.08
    assert {item.shape for item in held_out} == set(SHAPES)
    assert {item.color for item in held_out} == set(COLORS)
    rng = random.Random(5)
    for family in FAMILIES:
        for _ in range(150):
            task = any_training_task(family, rng)
            assert all(is_in_training(scene) for scene in (task.target, *task.references))


@given(seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_readings_are_answers_to_the_questions(seed: int) -> None:
    rng = random.Random(seed)
    tasks = [text_to_image(rng)]
    tasks += [edit(kind, rng) for kind in EDIT_KINDS]
    tasks += [two_references(kind, rng) for kind in TWO_REFERENCE_KINDS]
    for task in tasks:
        assert all(answer in READING[question] for question, answer in task.reading.items())
        assert len(task.references) <= 2
        assert task.prompt


@given(seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_an_edit_changes_the_picture_and_only_as_its_kind_says(seed: int) -> None:
    rng = random.Random(seed)
    for kind in EDIT_KINDS:
        task = edit(kind, rng)
        before, after = task.references[0], task.target
        assert before != after
        assert (before.background != after.background) == (kind == "background")
        assert len(after.items) - len(before.items) == {"add": 1, "remove": -1}.get(kind, 0)
        if kind in ("color", "shape", "move", "size"):
            changed = {"color": "color", "shape": "shape", "move": "place", "size": "size"}[kind]
            differing = [
                name
                for old, new in zip(before.items, after.items, strict=True)
                for name in ("shape", "color", "place", "size")
                if getattr(old, name) != getattr(new, name)
            ]
            assert differing == [changed]


@given(seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_a_caption_says_what_differs_from_the_defaults(seed: int) -> None:
    """A small size, a corner and a colored background may not stay unsaid: the words must tell scenes apart."""
    rng = random.Random(seed)
    scene = scenes.single_scene(rng)
    item = scene.items[0]
    text = caption(scene, rng).lower()
    sizes = (
        "small",
        "tiny",
        "teeny",
        "little",
        "mini",
        "large",
        "big",
        "huge",
        "giant",
        "massive",
        "enormous",
    )
    said_size = any(word in text for word in sizes)
    assert said_size or item.size == "medium"
    if item.place not in ("center", "left", "right", "top", "bottom"):
        assert item.place.split()[1] in text
    if not scene.background.is_plain:
        for color in (scene.background.top, scene.background.bottom):
            assert any(word in text for word in _COLOR_WORDS[color]), color


@pytest.mark.parametrize("path", [PARAPHRASES, BLIND_PARAPHRASES], ids=lambda path: path.stem)
def test_hand_written_prompts_have_answers_that_can_be_drawn(path: Path) -> None:
    written = [paraphrase(entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    assert len({task.prompt for task in written}) == len(written) >= 50
    for task in written:
        for scene in (task.target, *task.references):
            assert judge(render(scene, 128, 128), scene).everything, task.prompt
