"""Training tasks: a prompt, zero to two reference scenes, and the right target scene."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from training.pico import instructions
from training.pico.captions import FREE_SHARE, caption
from training.pico.scenes import (
    any_background,
    any_item,
    any_scene,
    double_scene,
    empty_scene,
    single_scene,
    visible_colors,
)
from training.pico.world import (
    COLORS,
    LAYOUTS,
    PLACES,
    SHAPES,
    SIZES,
    Background,
    Item,
    Scene,
    is_in_training,
)

EDIT_KINDS = ("color", "shape", "background", "move", "size", "add", "remove")
TWO_REFERENCE_KINDS = ("onto background", "color from second", "side by side", "stacked")

READING: dict[str, tuple[str, ...]] = {
    "kind": ("text to image", *EDIT_KINDS, "onto background", "color from second", "left right", "right left",
             "top bottom", "bottom top"),
    "top": ("", *COLORS),
    "bottom": ("", *COLORS),
    **{f"{which} {attribute}": values
       for which in ("first", "second")
       for attribute, values in (("shape", ("", *SHAPES)), ("color", ("", *COLORS)), ("place", ("", *PLACES)),
                                 ("size", ("", *SIZES, "bigger", "smaller")))},
}  # fmt: skip
"""The questions that a prompt answers, each with its possible answers; the first is "not said"."""


@dataclass(frozen=True)
class Task:
    """One request and its only right answer."""

    kind: str
    prompt: str
    target: Scene
    references: tuple[Scene, ...] = ()
    reading: dict[str, str] = field(default_factory=dict)
    """Answers of the prompt to the questions of `READING`; a missing one is "not said"."""


class _Impossible(Exception):
    """The drawn scene does not allow this change; draw another."""


def _retried(make: Callable[[random.Random], Task], rng: random.Random) -> Task:
    while True:
        try:
            return make(rng)
        except _Impossible:
            continue


def _describe(which: str, item: Item) -> dict[str, str]:
    return {f"{which} shape": item.shape, f"{which} color": item.color, f"{which} place": item.place,
            f"{which} size": item.size}  # fmt: skip


def _named(item: Item, scene: Scene, rng: random.Random) -> tuple[str, dict[str, str]]:
    """Returns words that refer to an item, and the attributes that they name."""
    name = instructions.name_of(item, scene, rng)
    return name.text, {f"first {attribute}": getattr(item, attribute) for attribute in sorted(name.said)}


def text_to_image(rng: random.Random, scene: Scene | None = None, free_share: float = FREE_SHARE) -> Task:
    """Describes `scene`, or a random one; `free_share` is the share of captions in free words."""
    scene = scene or any_scene(rng)
    reading = {"kind": "text to image", "top": scene.background.top, "bottom": scene.background.bottom}
    for which, item in zip(("first", "second"), scene.items, strict=False):
        reading |= _describe(which, item)
    return Task("text to image", caption(scene, rng, free_share), scene, (), reading)


def edit(kind: str, rng: random.Random) -> Task:
    """Draws a change of one reference; `kind` is one of `EDIT_KINDS`."""
    return _retried(_EDITS[kind], rng)


def two_references(kind: str, rng: random.Random) -> Task:
    """Draws a composition of two references; `kind` is one of `TWO_REFERENCE_KINDS`."""
    return _retried(_COMPOSITIONS[kind], rng)


def is_trainable(task: Task) -> bool:
    """Returns whether no held-out combination occurs in the target or in a reference."""
    return all(is_in_training(scene) for scene in (task.target, *task.references))


def _other(options: tuple[str, ...], current: str, rng: random.Random) -> str:
    remaining = [option for option in options if option != current]
    if not remaining:
        raise _Impossible
    return rng.choice(remaining)


def _one_or_two(rng: random.Random) -> Scene:
    return single_scene(rng) if rng.random() < 0.65 else double_scene(rng)


def _with_item(scene: Scene, old: Item, new: Item) -> Scene:
    items = tuple(new if item == old else item for item in scene.items)
    if len({(item.shape, item.color) for item in items}) < len(items):
        raise _Impossible
    return replace(scene, items=items)


def _edit_color(rng: random.Random) -> Task:
    scene = _one_or_two(rng)
    item = rng.choice(scene.items)
    color = _other(visible_colors(scene.background), item.color, rng)
    target = _with_item(scene, item, replace(item, color=color))
    name, described = _named(item, scene, rng)
    prompt = instructions.recolor(name, color, rng)
    return Task("color", prompt, target, (scene,), described | {"kind": "color", "second color": color})


def _edit_shape(rng: random.Random) -> Task:
    scene = _one_or_two(rng)
    item = rng.choice(scene.items)
    shape = _other(SHAPES, item.shape, rng)
    target = _with_item(scene, item, replace(item, shape=shape))
    name, described = _named(item, scene, rng)
    prompt = instructions.reshape(name, shape, rng)
    return Task("shape", prompt, target, (scene,), described | {"kind": "shape", "second shape": shape})


def _fits(items: tuple[Item, ...], background: Background) -> bool:
    return all(item.color in visible_colors(background) for item in items)


def _edit_background(rng: random.Random) -> Task:
    scene = _one_or_two(rng)
    background = any_background(rng)
    if background == scene.background or not _fits(scene.items, background):
        raise _Impossible
    reading = {"kind": "background", "top": background.top, "bottom": background.bottom}
    prompt = instructions.change_background(background, rng)
    return Task("background", prompt, replace(scene, background=background), (scene,), reading)


def _edit_size(rng: random.Random) -> Task:
    scene = single_scene(rng)
    item = scene.items[0]
    size = _other(SIZES, item.size, rng)
    name, described = _named(item, scene, rng)
    prompt, is_relative = instructions.resize(name, item.size, size, rng)
    grows = SIZES.index(size) > SIZES.index(item.size)
    said = ("bigger" if grows else "smaller") if is_relative else size
    target = _with_item(scene, item, replace(item, size=size))
    return Task("size", prompt, target, (scene,), described | {"kind": "size", "second size": said})


def _edit_move(rng: random.Random) -> Task:
    scene = single_scene(rng)
    item = scene.items[0]
    place = _other(tuple(PLACES), item.place, rng)
    name, described = _named(item, scene, rng)
    prompt = instructions.move(name, place, rng)
    target = _with_item(scene, item, replace(item, place=place))
    return Task("move", prompt, target, (scene,), described | {"kind": "move", "second place": place})


def _edit_add(rng: random.Random) -> Task:
    if rng.random() < 0.3:
        scene = empty_scene(rng)
        new = any_item(rng, scene.background)
        target = replace(scene, items=(new,))
    else:
        target = double_scene(rng)
        new = rng.choice(target.items)
        scene = replace(target, items=tuple(item for item in target.items if item != new))
    return Task(
        "add", instructions.add(new, rng), target, (scene,), {"kind": "add"} | _describe("second", new)
    )


def _edit_remove(rng: random.Random) -> Task:
    scene = single_scene(rng) if rng.random() < 0.3 else double_scene(rng)
    item = rng.choice(scene.items)
    target = replace(scene, items=tuple(other for other in scene.items if other != item))
    name, described = _named(item, scene, rng)
    return Task("remove", instructions.remove(name, rng), target, (scene,), described | {"kind": "remove"})


_EDITS: dict[str, Callable[[random.Random], Task]] = {
    "color": _edit_color, "shape": _edit_shape, "background": _edit_background, "move": _edit_move,
    "size": _edit_size, "add": _edit_add, "remove": _edit_remove,
}  # fmt: skip


def _compose_background(rng: random.Random) -> Task:
    scene = single_scene(rng)
    second = empty_scene(rng) if rng.random() < 0.3 else single_scene(rng)
    if second.background == scene.background or not _fits(scene.items, second.background):
        raise _Impossible
    target = replace(scene, background=second.background)
    kind = "onto background"
    return Task(kind, instructions.onto_background(rng), target, (scene, second), {"kind": kind})


def _compose_color(rng: random.Random) -> Task:
    scene, second = single_scene(rng), single_scene(rng)
    item, color = scene.items[0], second.items[0].color
    if color == item.color or color not in visible_colors(scene.background):
        raise _Impossible
    target = _with_item(scene, item, replace(item, color=color))
    kind = "color from second"
    return Task(kind, instructions.color_from_second(rng), target, (scene, second), {"kind": kind})


def _composed(
    rng: random.Random, layout: tuple[str, str], order: tuple[int, int]
) -> tuple[Scene, tuple[Scene, Scene]]:
    pair = single_scene(rng), single_scene(rng)
    items = tuple(
        replace(pair[number - 1].items[0], place=place) for number, place in zip(order, layout, strict=True)
    )
    background = pair[0].background
    same = (items[0].shape, items[0].color) == (items[1].shape, items[1].color)
    if same or not _fits(items, background):
        raise _Impossible
    return Scene(background, items), pair


def _compose_side_by_side(rng: random.Random) -> Task:
    order = (1, 2) if rng.random() < 0.65 else (2, 1)
    target, pair = _composed(rng, LAYOUTS[0], order)
    prompt = instructions.side_by_side(*order, rng)
    return Task(
        "side by side", prompt, target, pair, {"kind": "left right" if order == (1, 2) else "right left"}
    )


def _compose_stacked(rng: random.Random) -> Task:
    order = (1, 2) if rng.random() < 0.65 else (2, 1)
    target, pair = _composed(rng, LAYOUTS[1], order)
    prompt = instructions.stacked(*order, rng)
    return Task("stacked", prompt, target, pair, {"kind": "top bottom" if order == (1, 2) else "bottom top"})


_COMPOSITIONS: dict[str, Callable[[random.Random], Task]] = {
    "onto background": _compose_background, "color from second": _compose_color,
    "side by side": _compose_side_by_side, "stacked": _compose_stacked,
}  # fmt: skip
