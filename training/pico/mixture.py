"""Mixture of tasks and sizes in flow training, by the progress of training."""

from __future__ import annotations

import random
from dataclasses import dataclass

from training.pico.tasks import Task, edit, is_trainable, text_to_image, two_references
from training.pico.world import TOKEN_PX

Pixels = tuple[int, int]
"""Width and height."""

FAMILIES = ("text to image", "edit", "two references")
REFERENCE_COUNT = {"text to image": 0, "edit": 1, "two references": 2}
_EDIT_WEIGHTS = {
    "color": 1.4, "shape": 3.4, "background": 0.4, "move": 0.6, "size": 2.2, "add": 0.4, "remove": 2.8
}  # fmt: skip
_TWO_WEIGHTS = {"onto background": 1.0, "color from second": 1.0, "side by side": 1.6, "stacked": 1.2}
_SIDES_PX = tuple(range(64, 257, TOKEN_PX))
_POPULAR: tuple[Pixels, ...] = (
    (256, 256), (256, 256), (192, 192), (192, 192), (160, 160), (96, 96), (192, 128), (128, 192), (256, 128), (128, 256)
)  # fmt: skip
_OTHER_REFERENCE_SIZE = 0.4


@dataclass(frozen=True)
class Setting:
    """The sizes of one batch: all its pictures share them."""

    target: Pixels
    references: tuple[Pixels, ...]

    @property
    def image_tokens(self) -> int:
        """Latent tokens of the target and all references."""
        return sum(width * height // TOKEN_PX**2 for width, height in (self.target, *self.references))


def any_training_task(family: str, rng: random.Random) -> Task:
    """Draws a task of one family without held-out combinations."""
    while True:
        task = _any_task(family, rng)
        if is_trainable(task):
            return task


def _any_task(family: str, rng: random.Random) -> Task:
    if family == "text to image":
        return text_to_image(rng)
    if family == "edit":
        return edit(rng.choices(tuple(_EDIT_WEIGHTS), tuple(_EDIT_WEIGHTS.values()))[0], rng)
    return two_references(rng.choices(tuple(_TWO_WEIGHTS), tuple(_TWO_WEIGHTS.values()))[0], rng)


def family_shares(progress: float) -> dict[str, float]:
    """Returns each family's share of tokens and loss at a moment of training (0…1): first learn to draw."""
    if progress < 0.22:
        return dict(zip(FAMILIES, (0.62, 0.24, 0.14), strict=True))
    if progress < 0.42:
        return dict(zip(FAMILIES, (0.45, 0.31, 0.24), strict=True))
    if progress < 0.75:
        return dict(zip(FAMILIES, (0.4, 0.4, 0.2), strict=True))
    return dict(zip(FAMILIES, (0.28, 0.47, 0.25), strict=True))


def size_shares(progress: float) -> tuple[float, float, float]:
    """Returns the shares of 64², 128² and all other sizes at a moment of training (0…1)."""
    if progress < 0.22:
        return 0.85, 0.13, 0.02
    if progress < 0.42:
        return 0.15, 0.72, 0.13
    if progress < 0.75:
        return 0.05, 0.3, 0.65
    return 0.05, 0.4, 0.55


def any_setting(family: str, progress: float, rng: random.Random) -> Setting:
    """Draws the sizes of one batch."""
    kind = rng.choices(("64", "128", "other"), size_shares(progress))[0]
    target = {"64": (64, 64), "128": (128, 128)}.get(kind) or any_size(rng)
    references = tuple(
        any_size(rng) if progress > 0.25 and rng.random() < _OTHER_REFERENCE_SIZE else target
        for _ in range(REFERENCE_COUNT[family])
    )
    return Setting(target, references)


def any_size(rng: random.Random) -> Pixels:
    """Draws any size from 64 to 256 pixels a side; the popular ones more often."""
    draw = rng.random()
    if draw < 0.4:
        return rng.choice(_POPULAR)
    if draw < 0.5:
        return rng.choice(((64, 64), (128, 128)))
    return rng.choice(_SIDES_PX), rng.choice(_SIDES_PX)


def text_length(longest: int, full_length: int, progress: float, rng: random.Random) -> int:
    """Returns to how many tokens a batch's prompts are padded.

    Seldom the full length: a model that has seen both is no worse at the full length than at the short one.
    """
    full_share = 0.1 if progress < 0.9 else 0.5
    if rng.random() < full_share:
        return full_length
    return min(full_length, -(-longest // 4) * 4)
