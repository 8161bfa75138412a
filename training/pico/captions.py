"""Captions of scenes for text-to-image, in many wordings.

Defaults of attributes that a caption omits: a medium size, the center, a white background, two items side by side.
"""

from __future__ import annotations

import random
import string

from training.pico.free_captions import free_caption
from training.pico.words import (
    article,
    background_phrase,
    color_pair,
    color_word,
    noun,
    place_phrase,
    shape_word,
    size_word,
    strange_words,
)
from training.pico.world import Background, Item, Scene

_OPENINGS = (
    "draw ", "please draw ", "draw me ", "paint ", "make ", "please make ", "create ", "generate ", "show ", "show me ",
    "i want ", "i would like ", "give me ", "can you draw ", "could you paint ", "a picture of ", "an image of ",
    "a drawing of ", "an illustration of ", "a simple picture of ", "make a picture of ", "draw a picture with ",
    "a picture with ", "an image with ", "there is ", "a scene with ", "picture of ", "image of ", "render ",
    "a flat illustration of ", "a picture showing ", "we see ", "a poster with ", "a card with ", "design ",
)  # fmt: skip
_ENDINGS = (" please", ", please", " thanks", ", flat style", ", simple shapes", ", minimalist", ", high quality",
            ", vector art", ", clean edges", ", nothing else", ", flat colors")  # fmt: skip
FREE_SHARE = 0.35
"""Share of captions in free words instead of a template's."""
_ADJECTIVES = ("nice", "simple", "flat", "single", "beautiful", "pretty", "lovely", "solid", "perfect", "clean", "bold",
               "shiny", "neat", "lone", "cute", "geometric")  # fmt: skip


def finished(text: str, rng: random.Random) -> str:
    """Gives a sentence its capital, full stop, exclamation or stray blanks, or none of them."""
    draw = rng.random()
    if draw < 0.35:
        text = text[0].upper() + text[1:]
    elif draw < 0.37:
        text = text.upper()
    elif draw < 0.4:
        text = text.title()
    draw = rng.random()
    if text.endswith("?"):
        return text
    if draw < 0.3:
        text += "."
    elif draw < 0.33:
        text += "!"
    elif draw < 0.35:
        text = text.replace(",", "")
    return text


def with_stray_word(text: str, rng: random.Random) -> str:
    """Inserts one word from outside the vocabulary before a random word."""
    words = text.split(" ")
    draw = rng.random()
    if draw < 0.8:
        stray = rng.choice(strange_words())
    else:
        stray = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 7)))
    words.insert(rng.randrange(len(words)), stray)
    return " ".join(words)


def caption(scene: Scene, rng: random.Random, free_share: float = FREE_SHARE) -> str:
    """Describes a scene; reading it back under the rules of this module gives the same scene."""
    if not scene.items:
        text = _of_nothing(scene.background, rng)
    elif rng.random() < free_share:
        text = free_caption(scene, rng)
    elif len(scene.items) == 1:
        text = _of_one(scene.items[0], scene.background, rng)
    else:
        first, second = scene.items
        text = _of_two(first, second, scene.background, rng)
    if rng.random() < 0.06:
        text += rng.choice(_ENDINGS)
    if rng.random() < 0.06:
        text = with_stray_word(text, rng)
    return finished(text, rng)


def _opening(rng: random.Random) -> str:
    return rng.choice(_OPENINGS) if rng.random() < 0.35 else ""


def _of_nothing(background: Background, rng: random.Random) -> str:
    if background.is_plain:
        color = color_word(background.top, rng)
        kind = rng.choice((
            f"an empty {color} background", f"a plain {color} background", f"nothing but {color}",
            f"an empty {color} image", f"a {color} picture", f"only {color}", f"an empty {color} canvas",
            f"a blank {color} background", f"just a {color} background",
        ))  # fmt: skip
    else:
        top, bottom = color_pair(background, rng)
        kind = rng.choice((
            f"a gradient from {top} to {bottom}", f"an empty gradient background from {top} to {bottom}",
            f"a plain gradient from {top} to {bottom}", f"just {article(top)} to {bottom} gradient",
        ))  # fmt: skip
    return _opening(rng) + kind


def _named(item: Item, rng: random.Random) -> str:
    name = noun(item, rng)
    if rng.random() < 0.05:
        name = f"{rng.choice(_ADJECTIVES)} {name}"
    return article(name) if rng.random() < 0.93 else rng.choice((f"one {name}", f"the {name}", name))


def _behind(background: Background, rng: random.Random) -> str:
    if background == Background.plain("white") and rng.random() < 0.5:
        return ""
    return background_phrase(background, rng)


def _joined(parts: list[str], separator: str = " ") -> str:
    return separator.join(part for part in parts if part)


def _of_one(item: Item, background: Background, rng: random.Random) -> str:
    where = "" if item.place == "center" and rng.random() < 0.5 else place_phrase(item.place, rng)
    behind = _behind(background, rng)
    name = _named(item, rng)
    draw = rng.random()
    if draw < 0.5:
        return _opening(rng) + _joined([name, where, behind])
    if draw < 0.62:
        return _opening(rng) + _joined([name, behind, where])
    if draw < 0.7:
        return _joined([where + "," if where else "", _opening(rng) + name, behind])
    if draw < 0.78 and behind.startswith(("on ", "over ", "against ", "in front")):
        return _joined([behind + rng.choice((",", ":", " there is")), name, where])
    if draw < 0.9:
        return _as_statement(item, background, where, behind, rng)
    return _as_tags(item, background, where, rng)


def _as_statement(item: Item, background: Background, where: str, behind: str, rng: random.Random) -> str:
    shape, color = shape_word(item.shape, rng), color_word(item.color, rng)
    size = "" if item.size == "medium" else size_word(item.size, rng)
    canvas = background_words(background, rng)
    return rng.choice((
        _joined([f"{article(canvas)} background with", _named(item, rng), where]),
        _joined([f"the {shape} is {color}" + (f" and {size}" if size else ""), where, behind]),
        _joined([_opening(rng) + article(f"{size} {shape}".strip()), where, f"in {color}", behind]),
        _joined([_opening(rng) + article(f"{size} {shape}".strip()), f"colored {color}", where, behind]),
        _joined([_named(item, rng), "is" if where else "", where, behind]),
        _joined([_named(item, rng), where]) + f", {canvas} background",
        _joined([_named(item, rng), where]) + f". the background is {canvas}",
        _joined([f"{canvas} background,", _named(item, rng), where]),
        _joined([f"a {canvas} image with", _named(item, rng), where]),
        _joined([_opening(rng) + article(canvas) + " background and", _named(item, rng), where]),
    ))  # fmt: skip


def background_words(background: Background, rng: random.Random) -> str:
    """Names a background without an article, as in "red to blue gradient"."""
    if background.is_plain:
        return color_word(background.top, rng)
    top, bottom = color_pair(background, rng)
    return rng.choice(
        (f"{top} to {bottom} gradient", f"{top}-to-{bottom} gradient", f"{top} {bottom} gradient")
    )


def _as_tags(item: Item, background: Background, where: str, rng: random.Random) -> str:
    tags = [noun(item, rng)]
    if where:
        tags.append(rng.choice((where, item.place)))
    if background != Background.plain("white") or rng.random() < 0.5:
        tags.append(f"{background_words(background, rng)} background")
    if rng.random() < 0.4:
        rng.shuffle(tags)
    return ", ".join(tags)


def _of_two(first: Item, second: Item, background: Background, rng: random.Random) -> str:
    one, other = _named(first, rng), _named(second, rng)
    arranged = _side_by_side(one, other, rng) if first.place == "left" else _stacked(one, other, rng)
    behind = _behind(background, rng).replace("behind it", "behind them")
    draw = rng.random()
    if behind and draw < 0.12 and behind.startswith(("on ", "over ", "against ", "in front")):
        return f"{behind}, {arranged}"
    if draw < 0.2:
        return f"{article(background_words(background, rng))} background with {arranged}"
    if draw < 0.26:
        return f"{arranged}, {background_words(background, rng)} background"
    return _opening(rng) + _joined([arranged, behind])


def _side_by_side(one: str, other: str, rng: random.Random) -> str:
    return rng.choice((
        f"{one} to the left of {other}", f"{other} to the right of {one}", f"{one} left of {other}",
        f"{other} right of {one}", f"{one} on the left and {other} on the right",
        f"{other} on the right and {one} on the left", f"{one} and {other}", f"{one} and {other} side by side",
        f"{one} next to {other}", f"{one} beside {other}", f"{one} on the left, {other} on the right",
        f"on the left {one} and on the right {other}", f"left: {one}, right: {other}", f"{one}, {other}",
        f"two shapes: {one} and {other}", f"on the right {other}, on the left {one}",
        f"{one} on the left side and {other} on the right side", f"{one} with {other} to its right",
        f"{other} with {one} to its left", f"{one}, and to the right of it {other}",
    ))  # fmt: skip


def _stacked(one: str, other: str, rng: random.Random) -> str:
    return rng.choice((
        f"{one} above {other}", f"{other} below {one}", f"{one} on top of {other}", f"{one} over {other}",
        f"{one} at the top and {other} at the bottom", f"{other} under {one}", f"{other} beneath {one}",
        f"{other} at the bottom and {one} at the top", f"top: {one}, bottom: {other}", f"{other} underneath {one}",
        f"{one} at the top, {other} at the bottom", f"on top {one} and below it {other}",
        f"{one} with {other} below it", f"{other} with {one} above it", f"at the top {one}, at the bottom {other}",
    ))  # fmt: skip
