"""Draws random scenes of pico's world."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

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
    stands_out,
)

_COLORS = tuple(COLORS)
_PLACES = tuple(PLACES)


def any_background(rng: random.Random) -> Background:
    """White in a quarter of cases, another plain color in half, a gradient in the rest."""
    draw = rng.random()
    if draw < 0.25:
        return Background.plain("white")
    if draw < 0.8:
        return Background.plain(rng.choice(_COLORS))
    return Background(*rng.sample(_COLORS, 2))


@lru_cache(maxsize=256)
def visible_colors(background: Background) -> tuple[str, ...]:
    """Returns the colors that can be seen everywhere on a background."""
    return tuple(color for color in _COLORS if stands_out(color, background))


def any_size(rng: random.Random) -> str:
    """Medium in 45 % of cases."""
    return rng.choices(SIZES, (0.275, 0.45, 0.275))[0]


def any_item(
    rng: random.Random, background: Background, place: str | None = None, size: str | None = None
) -> Item:
    """Draws an item that stands out; centered in 30 % of cases unless the place is given."""
    if place is None:
        place = "center" if rng.random() < 0.3 else rng.choice(_PLACES)
    return Item(rng.choice(SHAPES), rng.choice(visible_colors(background)), place, size or any_size(rng))


def empty_scene(rng: random.Random) -> Scene:
    """A background alone."""
    return Scene(any_background(rng))


def single_scene(rng: random.Random) -> Scene:
    """One item, held-out combinations included."""
    background = any_background(rng)
    return Scene(background, (any_item(rng, background),))


def double_scene(rng: random.Random, layout: Sequence[str] | None = None) -> Scene:
    """Two items side by side or one above the other, different in shape or color."""
    background = any_background(rng)
    first_place, second_place = layout or rng.choice(LAYOUTS)
    first = any_item(rng, background, first_place)
    while True:
        second = any_item(rng, background, second_place)
        if (second.shape, second.color) != (first.shape, first.color):
            return Scene(background, (first, second))


def any_scene(rng: random.Random) -> Scene:
    """Mostly one or two items."""
    draw = rng.random()
    if draw < 0.05:
        return empty_scene(rng)
    return single_scene(rng) if draw < 0.55 else double_scene(rng)


def training_scene(rng: random.Random) -> Scene:
    """Like `any_scene`, without held-out combinations."""
    while True:
        scene = any_scene(rng)
        if is_in_training(scene):
            return scene
