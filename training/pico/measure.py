"""Judgment of an image against the scene it should show, from pixels alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from training.pico.world import (
    COLORS,
    PLACES,
    SHAPES,
    SIZES,
    Item,
    Scene,
    background_rows,
    coverage,
)

BACKGROUND_TOLERANCE = 16.0
"""Mean absolute difference, in levels of 255, up to which a background is right."""
LEAST_OVERLAP = 0.6
"""Below this intersection over union with its best template, a shape is no shape."""
EMPTY_SHARE = 0.003
"""Share of pixels that may differ from the background where nothing should be drawn."""
_CONTRAST = 40.0
_PALETTE = np.array(list(COLORS.values()), np.float32)


@dataclass(frozen=True)
class Judgment:
    """The right properties of an image; with two items, each property is right when it is for both."""

    background: bool
    color: bool
    shape: bool
    place: bool
    size: bool
    overlap: float
    """Intersection over union with what should be there, mean over the items; 1 where nothing should be."""

    @property
    def everything(self) -> bool:
        return self.background and self.color and self.shape and self.place and self.size


def judge(picture: NDArray[np.uint8], scene: Scene) -> Judgment:
    """Compares a picture (H, W, 3) with a scene.

    The background is the median of the two outer columns on both sides, row by row. An item is where pixels are
    nearer to its own median color than to the background; its shape, place and size are those of the best of all
    outlines that the world can draw.
    """
    pixels = picture.astype(np.float32)
    rows = np.median(np.concatenate([pixels[:, :2], pixels[:, -2:]], axis=1), axis=1)
    background = _is_background(rows, scene)
    contrast = np.linalg.norm(pixels - rows[:, None], axis=2)
    if not scene.items:
        empty = bool((contrast > _CONTRAST).mean() < EMPTY_SHARE)
        return Judgment(background, empty, empty, empty, empty, 1.0 if empty else 0.0)
    found = [_judge_item(pixels, rows, contrast, item, scene) for item in scene.items]
    color, shape, place, size = (all(one[index] for one in found) for index in range(4))
    return Judgment(background, color, shape, place, size, float(np.mean([one[4] for one in found])))


def nearest_color(rgb: NDArray[np.float32]) -> str:
    """Returns the name of the palette's color nearest to (3,) levels."""
    return list(COLORS)[int(np.square(_PALETTE - rgb).sum(1).argmin())]


def _is_background(rows: NDArray[np.float32], scene: Scene) -> bool:
    difference = np.abs(rows - background_rows(scene.background, len(rows))).mean()
    named = not scene.background.is_plain or nearest_color(np.median(rows, axis=0)) == scene.background.top
    return bool(difference < BACKGROUND_TOLERANCE) and named


def _judge_item(
    pixels: NDArray[np.float32],
    rows: NDArray[np.float32],
    contrast: NDArray[np.float32],
    item: Item,
    scene: Scene,
) -> tuple[bool, bool, bool, bool, float]:
    """Returns whether color, shape, place and size are right, and the overlap."""
    height, width = contrast.shape
    region = _region(item, scene, width, height)
    clear = (contrast > _CONTRAST) & region
    if not clear.any():
        return False, False, False, False, 0.0
    strong = clear & (contrast >= np.quantile(contrast[clear], 0.4))
    color = np.median(pixels[strong], axis=0)
    # Where the projection onto the line from background to item passes one half, the item begins.
    line = color - rows[:, None]
    share = ((pixels - rows[:, None]) * line).sum(2) / np.maximum(np.square(line).sum(2), 1.0)
    mask = ((share > 0.5) & region).reshape(-1).astype(np.float32)
    outlines, areas = _outlines(width, height)
    common = outlines @ mask
    overlaps = common / np.maximum(areas + mask.sum() - common, 1.0)
    shape, place, size = _ATTRIBUTES[int(overlaps.argmax())]
    is_shape = overlaps.max() >= LEAST_OVERLAP and shape == item.shape
    own = _ATTRIBUTES.index((item.shape, item.place, item.size))
    is_color = nearest_color(color) == item.color
    return is_color, bool(is_shape), place == item.place, size == item.size, float(overlaps[own])


def _region(item: Item, scene: Scene, width: int, height: int) -> NDArray[np.bool_]:
    """Returns where an item is looked for: everywhere, or in its half if there are two."""
    region = np.ones((height, width), np.bool_)
    if len(scene.items) == 2:
        across, down = np.arange(width) < width // 2, np.arange(height)[:, None] < height // 2
        halves = {"left": across, "right": ~across, "top": down, "bottom": ~down}
        region &= halves[item.place]
    return region


_ATTRIBUTES = [(shape, place, size) for shape in SHAPES for place in PLACES for size in SIZES]


@lru_cache(maxsize=24)
def _outlines(width: int, height: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns every outline that can be drawn, flattened, and their areas in pixels."""
    drawn = [
        (coverage(Item(shape, "red", place, size), width, height) > 0.5).reshape(-1)
        for shape, place, size in _ATTRIBUTES
    ]
    outlines = np.stack(drawn).astype(np.float32)
    return outlines, outlines.sum(1)
