"""The world that pico knows: flat shapes on plain or vertical-gradient backgrounds.

A picture is a deterministic function of its scene and its size in pixels. Centers lie on the 16-pixel
grid of the latent tokens and radii on a short ladder, so that one drawn outline always falls into the
tokens in the same way: six shapes on six radii are all that a model has to draw, wherever they stand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Rgb = tuple[int, int, int]

TOKEN_PX = 16
"""Side of the square that one latent token stands for."""
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
COLORS: dict[str, Rgb] = {
    "red": (222, 36, 40),
    "orange": (255, 146, 20),
    "yellow": (252, 226, 60),
    "green": (38, 160, 70),
    "blue": (36, 86, 222),
    "purple": (136, 52, 190),
    "black": (24, 24, 28),
    "white": (250, 250, 250),
}
SIZES = ("small", "medium", "large")
PLACES: dict[str, tuple[str, str]] = {
    "center": ("middle", "middle"),
    "left": ("near", "middle"),
    "right": ("far", "middle"),
    "top": ("middle", "near"),
    "bottom": ("middle", "far"),
    "top left": ("near", "near"),
    "top right": ("far", "near"),
    "bottom left": ("near", "far"),
    "bottom right": ("far", "far"),
}
"""Center of an item in each place, as (column, row)."""
LAYOUTS = (("left", "right"), ("top", "bottom"))
"""The two ways in which two items stand in one picture."""

_RADIUS_LADDER_PX = (8, 11, 15, 22, 30, 45)
_SUPERSAMPLING = 8
_CLASH_DISTANCE = 90.0


@dataclass(frozen=True)
class Background:
    """A vertical gradient; plain where both colors are the same."""

    top: str
    bottom: str

    @classmethod
    def plain(cls, color: str) -> Background:
        return cls(color, color)

    @property
    def is_plain(self) -> bool:
        return self.top == self.bottom


@dataclass(frozen=True)
class Item:
    """One shape in a picture."""

    shape: str
    color: str
    place: str = "center"
    size: str = "medium"


@dataclass(frozen=True)
class Scene:
    """A background and zero, one or two items."""

    background: Background
    items: tuple[Item, ...] = ()


def radius_px(size: str, width_px: int, height_px: int) -> int:
    """Returns the radius of an item; it depends on the shorter side in three wide steps."""
    shorter_tokens = min(width_px, height_px) // TOKEN_PX
    offset = 0 if shorter_tokens <= 6 else 2 if shorter_tokens <= 10 else 3
    return _RADIUS_LADDER_PX[offset + SIZES.index(size)]


def center_px(place: str, width_px: int, height_px: int) -> tuple[int, int]:
    """Returns (x, y) of an item's center, a corner between four latent tokens."""
    column, row = PLACES[place]
    return _grid_px(column, width_px), _grid_px(row, height_px)


def _grid_px(station: str, side_px: int) -> int:
    tokens = side_px // TOKEN_PX
    near = math.ceil(tokens / 4 - 0.5)
    return TOKEN_PX * {"near": near, "middle": tokens // 2, "far": tokens - near}[station]


def _star() -> list[tuple[float, float]]:
    angles = [math.pi * (k / 5 - 0.5) for k in range(10)]
    lengths = [1.06 if k % 2 == 0 else 0.44 for k in range(10)]
    return [(n * math.cos(a), n * math.sin(a) + 0.06) for n, a in zip(lengths, angles, strict=True)]


def _heart() -> list[tuple[float, float]]:
    outline = []
    for k in range(96):
        t = 2 * math.pi * k / 96
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        outline.append((math.sin(t) ** 3, -(y + 2.5) / 15.0))
    return outline


_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0.0, -0.96), (0.98, 0.8), (-0.98, 0.8)],
    "star": _star(),
    "heart": _heart(),
}


@lru_cache(maxsize=256)
def stamp(shape: str, radius: int) -> NDArray[np.float32]:
    """Draws one shape in white on black, anti-aliased.

    Returns:
        Coverage from 0 to 1, (side, side), whole tokens wide, the shape's center in the middle.
    """
    half = TOKEN_PX * math.ceil(radius / TOKEN_PX)
    side = 2 * half * _SUPERSAMPLING
    picture = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(picture)
    middle, scale = half * _SUPERSAMPLING - 0.5, radius * _SUPERSAMPLING
    if shape in _POLYGONS:
        draw.polygon([(middle + scale * x, middle + scale * y) for x, y in _POLYGONS[shape]], fill=255)
    else:
        _disc(draw, middle, 0.98 * scale, 255)
        if shape == "ring":
            _disc(draw, middle, 0.52 * scale, 0)
    coverage = np.asarray(picture.reduce(_SUPERSAMPLING), np.float32) / np.float32(255)
    coverage.setflags(write=False)
    return coverage


def _disc(draw: ImageDraw.ImageDraw, middle: float, radius: float, fill: int) -> None:
    draw.ellipse([middle - radius, middle - radius, middle + radius, middle + radius], fill=fill)


def coverage(item: Item, width_px: int, height_px: int) -> NDArray[np.float32]:
    """Returns how much of each pixel an item covers, 0 to 1, (height, width)."""
    canvas = np.zeros((height_px, width_px), np.float32)
    rows, columns, mark = _placed_stamp(item, width_px, height_px)
    canvas[rows, columns] = mark
    return canvas


def _placed_stamp(item: Item, width_px: int, height_px: int) -> tuple[slice, slice, NDArray[np.float32]]:
    mark = stamp(item.shape, radius_px(item.size, width_px, height_px))
    x, y = center_px(item.place, width_px, height_px)
    half = mark.shape[0] // 2
    return slice(y - half, y + half), slice(x - half, x + half), mark


def background_rows(background: Background, height_px: int) -> NDArray[np.float32]:
    """Returns the background's color in each row, 0 to 255, (height, 3)."""
    down = ((np.arange(height_px, dtype=np.float32) + 0.5) / height_px)[:, None]
    top = np.array(COLORS[background.top], np.float32)
    bottom = np.array(COLORS[background.bottom], np.float32)
    return (top * (1 - down) + bottom * down).astype(np.float32)


def render(scene: Scene, width_px: int, height_px: int) -> NDArray[np.uint8]:
    """Draws a scene.

    Args:
        scene: what to draw.
        width_px: a multiple of 16 from 64 to 256.
        height_px: likewise.

    Returns:
        RGB, (height, width, 3).
    """
    rows = background_rows(scene.background, height_px)
    canvas = np.repeat(rows[:, None], width_px, axis=1)
    for item in scene.items:
        window_rows, window_columns, mark = _placed_stamp(item, width_px, height_px)
        window = canvas[window_rows, window_columns]
        window += (np.array(COLORS[item.color], np.float32) - window) * mark[..., None]
    return np.rint(canvas).astype(np.uint8)


@lru_cache(maxsize=4096)
def stands_out(color: str, background: Background) -> bool:
    """Returns whether an item of this color can be seen everywhere on this background."""
    rows = background_rows(background, 32)
    distance = np.linalg.norm(rows - np.array(COLORS[color], np.float32), axis=1)
    return bool(distance.min() > _CLASH_DISTANCE)


def is_held_out(item: Item) -> bool:
    """Returns whether this combination of shape, color and place is kept out of all training.

    One in seventeen is, spread so that each shape, color and place is seen in many other combinations.
    """
    color, place = list(COLORS).index(item.color), list(PLACES).index(item.place)
    return (3 * SHAPES.index(item.shape) + color + 2 * place) % 17 == 3


def is_in_training(scene: Scene) -> bool:
    """Returns whether no item of the scene is a held-out combination."""
    return not any(is_held_out(item) for item in scene.items)
